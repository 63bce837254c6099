"""Video tokenizers behind one interface, `VideoTokenizer`, generators of their latents behind
another, `LatentGenerator`, and the registries of their names."""

from vtok_ext.models._generators import create_generator, list_generators, load_generator
from vtok_ext.models._registry import create_model, list_models, load_model
from vtok_ext.models.base import VideoTokenizer
from vtok_ext.models.coordtok import CoordTok
from vtok_ext.models.coordtok_config import CoordTokConfig
from vtok_ext.models.encoding import Encoding, Output, Tokens
from vtok_ext.models.generator import LatentGenerator
from vtok_ext.models.gpt import GPT, GPTConfig
from vtok_ext.models.promag import ProMAG
from vtok_ext.models.promag_config import ProMAGConfig
from vtok_ext.models.promag_grown import Grown, GrownConfig, grow
from vtok_ext.models.sit import SiT
from vtok_ext.models.sit_config import SiTConfig
from vtok_ext.models.streaming import StreamDecoder, StreamEncoder
from vtok_ext.models.vidtok import VidTok
from vtok_ext.models.vidtok_config import VidTokConfig
from vtok_ext.models.vtok import VTok
from vtok_ext.models.vtok_config import VTokConfig

__all__ = [
    "GPT",
    "CoordTok",
    "CoordTokConfig",
    "Encoding",
    "Grown",
    "GrownConfig",
    "GPTConfig",
    "LatentGenerator",
    "Output",
    "ProMAG",
    "ProMAGConfig",
    "SiT",
    "SiTConfig",
    "StreamDecoder",
    "StreamEncoder",
    "Tokens",
    "VTok",
    "VTokConfig",
    "VidTok",
    "VidTokConfig",
    "VideoTokenizer",
    "create_generator",
    "create_model",
    "grow",
    "list_generators",
    "list_models",
    "load_generator",
    "load_model",
]
