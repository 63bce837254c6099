"""Video tokenizers behind one interface, `VideoTokenizer`, and the registry of their names."""

from vtok_ext.models._registry import create_model, list_models, load_model
from vtok_ext.models.base import VideoTokenizer
from vtok_ext.models.coordtok import CoordTok
from vtok_ext.models.coordtok_config import CoordTokConfig
from vtok_ext.models.encoding import Encoding, Output, Tokens
from vtok_ext.models.streaming import StreamDecoder, StreamEncoder
from vtok_ext.models.vidtok import VidTok
from vtok_ext.models.vidtok_config import VidTokConfig
from vtok_ext.models.vtok import VTok
from vtok_ext.models.vtok_config import VTokConfig

__all__ = [
    "CoordTok",
    "CoordTokConfig",
    "Encoding",
    "Output",
    "StreamDecoder",
    "StreamEncoder",
    "Tokens",
    "VTok",
    "VTokConfig",
    "VidTok",
    "VidTokConfig",
    "VideoTokenizer",
    "create_model",
    "list_models",
    "load_model",
]
