"""VidTok's released YAML files, read unmodified and without executing anything in them.

`target:` names are looked up in fixed tables, never imported. Of OmegaConf's interpolation only
`${path.to.another.node}` of the same file is followed; resolvers such as `${oc.env:...}` are
refused. Source: microsoft/VidTok, configs/ of releases 1.0 and 1.1.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from vtok_ext.models._config import closest
from vtok_ext.models._persistence import MAX_CONFIG_BYTES
from vtok_ext.models.vidtok_config import VidTokConfig

YAML_SUFFIXES = (".yaml", ".yml")
_OP = "released_config"
# (version, causal) of an encoder; its decoder and its engine.
_NETWORKS = {
    "vidtok.modules.model_3dcausal.EncoderCausal3DPadding": ("1.0", True),
    "vidtok.modules.model_3dcausal_v1_1.EncoderCausal3DPadding": ("1.1", True),
    "vidtok.modules.model_3dnoncausal.Encoder3D": ("1.0", False),
}
_DECODERS = {name: name.replace(".Encoder", ".Decoder") for name in _NETWORKS}
_ENGINES = {
    "vidtok.models.autoencoder.AutoencodingEngine": "1.0",
    "vidtok.models.autoencoder_v1_1.AutoencodingEngine": "1.1",
}
_REGULARIZERS = {
    "vidtok.modules.regularizers.DiagonalGaussianRegularizer": "kl",
    "vidtok.modules.regularizers.FSQRegularizer": "fsq",
}
# Fields with the meaning and the name that they have here, all of them with a value.
_SAME = ("in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks", "norm_type")
_STEPS = ("spatial_ds", "spatial_us", "tempo_ds", "tempo_us")
# Fields that must have this value, or say how to train, which a configuration does not.
_FIXED = {"dropout": 0.0, "init_pad_mode": "replicate"}
_TRAINING = ("use_checkpoint", "fix_encoder", "fix_decoder")
_DERIVED = ("double_z", "z_channels", "time_downsample_factor", "interpolation_mode")
_INTERPOLATIONS = {"nearest": "nearest", "trilinear": "linear"}
# Names and defaults of the FSQ regulariser's weights: theirs, ours, value when left out.
_FSQ_WEIGHTS = (
    ("entropy_loss_weight", "entropy_weight", 0.0),
    ("entropy_loss_annealing_steps", "entropy_annealing_steps", 0),
    ("entropy_loss_annealing_factor", "entropy_annealing_factor", 1.0),
    ("commitment_loss_weight", "commitment_weight", 0.0),
)


def released_config(path: str | os.PathLike) -> VidTokConfig:
    """Returns the configuration in a released YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not YAML, a network or option that is not in the tables above, parts of
            different versions, or values that contradict each other.
    """
    model = _Node(_read_yaml(path), os.fspath(path)).child("model")
    engine = model.choice("target", _ENGINES)
    params = model.child("params")
    encoder, decoder = params.child("encoder_config"), params.child("decoder_config")
    version, causal = encoder.choice("target", _NETWORKS)
    if engine != version:
        encoder.fail("target", f"a network of version {engine}, that of the engine")
    if decoder.value("target") != _DECODERS[encoder.value("target")]:
        decoder.fail("target", f"{_DECODERS[encoder.value('target')]}, that of the encoder")
    if params.value("is_causal", causal) != causal:
        params.fail("is_causal", f"{causal}, as the encoder's target says")
    net = encoder.child("params")
    if decoder.child("params").fields != net.fields:
        decoder.fail("params", "equal to the encoder's")
    fields = {"version": version, "causal": causal, **_network_fields(net, causal)}
    regularizer = params.child("regularizer_config")
    kind = regularizer.choice("target", _REGULARIZERS)
    fields |= _regularizer_fields(kind, net, regularizer)
    config = VidTokConfig.from_dict({"regularizer": kind, **fields})
    factor = 2 ** len(config.steps("tempo_ds"))
    if net.value("time_downsample_factor", 4) != factor:
        net.fail("time_downsample_factor", f"{factor}, what the temporal steps give")
    return config


def _network_fields(net: _Node, causal: bool) -> dict[str, Any]:
    known = (*_SAME, *_STEPS, *_FIXED, *_TRAINING, *_DERIVED)
    for name in net.fields:
        if name not in known:
            raise ValueError(
                f"{_OP}: {net.where(name)} must be one of {', '.join(known)}, "
                f"got {name!r}{closest(name, known)}"
            )
    for name, value in _FIXED.items():
        if net.value(name, value) != value:
            net.fail(name, repr(value))
    fields = {name: net.fields[name] for name in _SAME if name in net.fields}
    if causal:  # the non-causal network has steps of its own and ignores the lists
        fields |= {name: net.fields[name] for name in _STEPS if net.fields.get(name) is not None}
        if "interpolation_mode" in net.fields:
            fields["interpolation"] = net.choice("interpolation_mode", _INTERPOLATIONS)
    return fields


def _regularizer_fields(kind: str, net: _Node, regularizer: _Node) -> dict[str, Any]:
    if net.value("double_z", kind == "kl") != (kind == "kl"):
        net.fail("double_z", f"{kind == 'kl'} with this regulariser")
    fields: dict[str, Any] = {"z_channels": net.value("z_channels")}
    options = regularizer.child("params") if "params" in regularizer.fields else None
    if options is None:
        return fields
    if kind == "kl":
        # `sample`: whether latents are drawn, which `encode` is told at every call.
        known: tuple[str, ...] = ("sample",)
    else:
        known = ("levels", *(theirs for theirs, _, _ in _FSQ_WEIGHTS))
        fields["levels"] = options.value("levels")
        fields |= {ours: options.value(theirs, v) for theirs, ours, v in _FSQ_WEIGHTS}
    for name in options.fields:
        if name not in known:
            raise ValueError(
                f"{_OP}: {options.where(name)} must be one of {', '.join(known)}, "
                f"got {name!r}{closest(name, known)}"
            )
    return fields


class _Node:
    """A mapping of the file, its address in it, and the whole file for references."""

    def __init__(self, fields: Any, file: str, address: str = "", root: Any = None) -> None:
        self.file, self.address = file, address
        self.root = fields if root is None else root
        if not isinstance(fields, dict):
            raise ValueError(
                f"{_OP}: {address or 'the content'} must be a mapping, "
                f"got {type(fields).__name__} in {file!r}"
            )
        self.fields = fields

    def where(self, name: str) -> str:
        return f"{self.address}.{name}" if self.address else name

    def child(self, name: str) -> _Node:
        return _Node(self.value(name), self.file, self.where(name), self.root)

    def value(self, name: str, default: Any = None) -> Any:
        if name not in self.fields:
            if default is None:
                raise ValueError(
                    f"{_OP}: {self.where(name)} must be given, got none in {self.file!r}"
                )
            return default
        value = self.fields[name]
        return self._followed(name, value) if isinstance(value, str) and "${" in value else value

    def choice(self, name: str, table: dict[str, Any]) -> Any:
        value = self.value(name)
        if not isinstance(value, str) or value not in table:
            self.fail(name, f"one of {', '.join(table)}")
        return table[value]

    def fail(self, name: str, requirement: str) -> None:
        value = self.fields.get(name)
        raise ValueError(
            f"{_OP}: {self.where(name)} must be {requirement}, got {value!r} in {self.file!r}"
        )

    def _followed(self, name: str, text: str) -> Any:
        """Returns the node of the file that `${a.b.c}` names; a reference to it is not followed."""
        match = re.fullmatch(r"\$\{([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)\}", text.strip())
        target: Any = self.root
        for part in match[1].split(".") if match else ():
            target = target.get(part) if isinstance(target, dict) else None
        if match is None or target is None or isinstance(target, str) and "${" in target:
            self.fail(name, "a value or a reference ${path.to.one} to one in the same file")
        return target


def _read_yaml(path: str | os.PathLike) -> Any:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{_OP}: {os.fspath(path)!r} must be a file, got none")
    if os.path.getsize(path) > MAX_CONFIG_BYTES:
        raise ValueError(f"{_OP}: {os.fspath(path)!r} must be <= 1 MiB, got a larger file")
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        text = Path(path).read_text(encoding="utf-8")
        # Aliases of aliases are how a small file becomes a huge object.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ValueError(f"{_OP}: {os.fspath(path)!r} must have no YAML aliases, got some")
        # Interpolations are left as text: resolving them could read the environment.
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{_OP}: {os.fspath(path)!r} must be YAML, got {reason}") from error
