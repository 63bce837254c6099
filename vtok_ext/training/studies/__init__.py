"""Studies: experiments of rows x seeds whose claims get verdicts. See `specification`."""
