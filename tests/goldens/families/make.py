"""Makes the golden models of tests/models/families with the reference implementations of transformers.

Run by hand, in an environment with torch and transformers (made with torch 2.13 and transformers 5.23):

    python tests/goldens/families/make.py [NAME …]

Each file holds a tiny model with random weights: config.json as text ("config"), the weights under their names in
transformers ("w:<name>", float16, to which they were rounded before use), tokens and float32 logits; for some, the
gradients of the mean next-token loss too ("g:<name>", float16).
"""

import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))
LENGTH = 40
BALANCE = "e_score_correction_bias"
"""A router's balancing bias, which is no parameter."""


def save(
    name: str, config: "transformers.PretrainedConfig", *, gradients: bool = False, norm: float = 1.0,
    spread: float = 0.3, pack: Callable | None = None, without: str = "$^",
) -> None:  # fmt: skip
    """Write <name>.npz from a random model of this config: norms' scales around `norm`, a deviation of `spread`.

    `pack` writes config.json and tensors as another family has them that transformers does not know; weights whose
    names match the pattern `without` are 0 and left out.
    """
    torch.manual_seed(abs(hash_of(name)))
    config._attn_implementation = config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            # Norms around 1 and biases away from 0, so that none of them can be left out unseen.
            center = norm if "norm" in key or ".ln_" in key else 0.0
            weight.copy_((torch.randn_like(weight) * spread + center).half().float())
            if re.search(without, key):
                weight.zero_()
        for key, buffer in model.named_buffers():
            if key.endswith(BALANCE):
                buffer.copy_((torch.randn_like(buffer) * spread).half().float())
    tokens = torch.randint(0, config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    output = model(tokens, labels=tokens if gradients else None)
    arrays = {"tokens": tokens.numpy().astype(np.int32), "logits": output.logits.detach().numpy()}
    config_json, weights = packed(model, pack, without)
    arrays["config"] = np.frombuffer(config_json, np.uint8)
    for key, weight in weights.items():
        arrays[f"w:{key}"] = weight.astype(np.float16)
        assert np.array_equal(arrays[f"w:{key}"].astype(np.float32), weight), key
    if gradients:
        output.loss.backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(torch.zeros_like(weight) if weight.grad is None else weight.grad)
        for key, gradient in packed(model, pack, without)[1].items():
            if not key.endswith(BALANCE):
                arrays[f"g:{key}"] = gradient.astype(np.float16)
    np.savez_compressed(FOLDER / f"{name}.npz", **arrays)
    size = (FOLDER / f"{name}.npz").stat().st_size
    print(f"{name}: {size / 1000:.0f} kB, logits up to {np.abs(arrays['logits']).max():.2f}")
    assert size < 200_000, name


def packed(
    model: "transformers.PreTrainedModel", pack: Callable | None, without: str
) -> tuple[bytes, dict[str, np.ndarray]]:
    """What `written` gives, as the family has it that `pack` knows."""
    config, weights = written(model)
    kept = {key: weight for key, weight in weights.items() if not re.search(without, key)}
    if pack is None:
        return config, kept
    keys, kept = pack(json.loads(config), kept)
    return json.dumps(keys).encode(), kept


def written(model: "transformers.PreTrainedModel") -> tuple[bytes, dict[str, np.ndarray]]:
    """config.json and the tensors as files hold them: those of experts are not joined there as they are in memory."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = load_file(Path(folder) / "model.safetensors")
        config = (Path(folder) / "config.json").read_bytes()
    return config, {key: weight.float().numpy() for key, weight in weights.items()}


def hash_of(name: str) -> int:
    """A seed that is the same in every process."""
    return int.from_bytes(name.encode(), "little") % 2**31


def main() -> None:
    """Make the files of the given names, or all."""
    import dense
    import experts
    import others

    cases = {**dense.CASES, **others.CASES, **experts.CASES}
    for name in sys.argv[1:] or cases:
        made = cases[name]()
        config, options = made if isinstance(made, tuple) else (made, {})
        save(name, config, **options)


if __name__ == "__main__":
    main()
