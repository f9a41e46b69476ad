"""How many bits a model's weights and its KV cache take, from the `quantization_config` of its `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_BYTES = {
    "float16": 2.0, "bfloat16": 2.0, "half": 2.0, "float8_e4m3fn": 1.0, "float8_e5m2": 1.0, "float32": 4.0,
}
_METHODS = (
    "fp8, fbgemm_fp8, gptq, awq, bitsandbytes, mxfp4, modelopt, compressed-tensors"
)


class UnknownModel(ValueError):
    """A `config.json` that the estimate cannot read; the message says what is missing and what to do."""


INSTEAD = "measure the model where it will run, with headrace profile measure, or give a profile's file"


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """name: as people say it. weight_bits: of a weight in a quantised linear layer, its scales included.
    eight_bit_compute: activations are 8 bits wide too, so that products run at the 8-bit rate where there is one.
    all_layers: attention is quantised as well; False: routed experts alone. kv_bytes: of one number in the KV cache, if
    the checkpoint says so.
    """

    name: str
    weight_bits: float
    eight_bit_compute: bool = False
    all_layers: bool = True
    kv_bytes: float | None = None


def bytes_of_dtype(dtype: str) -> float:
    """Bytes of a number of that type.

    Raises:
        UnknownModel: a type that is not known.
    """
    name = dtype.removeprefix("torch.")
    if name not in _BYTES:
        raise UnknownModel(f"dtype {dtype!r} is not known; allowed: {', '.join(_BYTES)}")
    return _BYTES[name]


def weight_format(config: Mapping[str, Any], dtype: str) -> WeightFormat:
    """The format of the weights in the linear layers.

    Raises:
        UnknownModel: a quantisation that is not known.
    """
    given = config.get("quantization_config") or config.get("compression_config")
    if not given:
        return WeightFormat(dtype.removeprefix("torch."), 8 * bytes_of_dtype(dtype))
    given = _object("quantization_config", given)
    method = str(given.get("quant_method", "")).lower()
    match method:
        case "fp8" | "fbgemm_fp8":
            return WeightFormat("fp8", 8.0, eight_bit_compute=True)
        case "gptq" | "awq" | "gptq_marlin" | "awq_marlin":
            bits = _bits(given, "bits" if "bits" in given else "w_bit", 4)
            return _grouped(method, bits, given.get("group_size", 128))
        case "bitsandbytes":
            return _grouped("bitsandbytes", 4.0 if given.get("load_in_4bit") else 8.0, 64)
        case "mxfp4":  # a scale of 8 bits for 32 numbers; the published checkpoints keep all but experts as they are
            return WeightFormat("mxfp4", 4.25, all_layers=False)
        case "modelopt" | "modelopt_fp4":
            return _modelopt(given)
        case "compressed-tensors":
            return _compressed_tensors(given)
    raise UnknownModel(f"quant_method {method!r} is not known; known: {_METHODS}; {INSTEAD}")


def _object(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UnknownModel(f"{name} is {value!r}; it must be an object; {INSTEAD}")
    return value


def _bits(given: Mapping[str, Any], name: str, otherwise: float) -> float:
    value = given.get(name, otherwise)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 64:
        raise UnknownModel(f"{name} of the quantisation is {value!r}; it must be a number of bits; {INSTEAD}")
    return float(value)


def _grouped(name: str, bits: float, group: Any) -> WeightFormat:
    """Integers with a scale of 16 bits and a zero point of `bits` for each group."""
    size = group if isinstance(group, int) and group > 0 else 4096  # -1: one group a row
    return WeightFormat(f"{name} {bits:g}-bit", bits + (16 + bits) / size)


def _modelopt(given: Mapping[str, Any]) -> WeightFormat:
    details = _object("quantization", given.get("quantization", given))
    algorithm = str(details.get("quant_algo", "")).upper()
    kv = 1.0 if "FP8" in str(details.get("kv_cache_quant_algo", "")).upper() else None
    if algorithm == "FP8":
        return WeightFormat("fp8", 8.0, eight_bit_compute=True, kv_bytes=kv)
    if algorithm in ("NVFP4", "FP4"):  # a scale of 8 bits for 16 numbers
        return WeightFormat("nvfp4", 4.5, eight_bit_compute=True, kv_bytes=kv)
    raise UnknownModel(f"quant_algo {algorithm!r} of modelopt is not known; known: FP8, NVFP4; {INSTEAD}")


def _compressed_tensors(given: Mapping[str, Any]) -> WeightFormat:
    every = _object("config_groups", given.get("config_groups") or {})
    groups = [one for name, of_it in every.items() if (one := _object(name, of_it)).get("weights")]
    if not groups:
        raise UnknownModel(f"compressed-tensors has no config_groups with weights; {INSTEAD}")
    weights = _object("weights", groups[0]["weights"])
    inputs = _object("input_activations", groups[0].get("input_activations") or {})
    scheme = _object("kv_cache_scheme", given.get("kv_cache_scheme") or {})
    bits, input_bits, group = _bits(weights, "num_bits", 16), _bits(inputs, "num_bits", 16), weights.get("group_size")
    scales = 16.0 / group if isinstance(group, int) and group > 0 else 0.0
    return WeightFormat(
        f"compressed-tensors w{bits:g}a{input_bits:g}", bits + scales, eight_bit_compute=input_bits <= 8,
        kv_bytes=_bits(scheme, "num_bits", 8) / 8 if scheme.get("num_bits") else None,
    )
