"""Video tokenizers behind one interface, `VideoTokenizer`, and the registry of their names."""

from vtok_ext.models._registry import create_model, list_models, load_model
from vtok_ext.models.base import VideoTokenizer
from vtok_ext.models.coordtok import CoordTok
from vtok_ext.models.coordtok_config import CoordTokConfig
from vtok_ext.models.encoding import Encoding, Output, Tokens
from vtok_ext.models.promag import ProMAG
from vtok_ext.models.promag_config import ProMAGConfig
from vtok_ext.models.promag_grown import Grown, GrownConfig, grow
from vtok_ext.models.streaming import StreamDecoder, StreamEncoder
from vtok_ext.models.vidtok import VidTok
from vtok_ext.models.vidtok_config import VidTokConfig

__all__ = [
    "CoordTok",
    "CoordTokConfig",
    "Encoding",
    "Grown",
    "GrownConfig",
    "Output",
    "ProMAG",
    "ProMAGConfig",
    "StreamDecoder",
    "StreamEncoder",
    "Tokens",
    "VidTok",
    "VidTokConfig",
    "VideoTokenizer",
    "create_model",
    "grow",
    "list_models",
    "load_model",
]
