"""Video files (`data.video`), a procedural clip (`data.procedural`), pictures and safe output."""
