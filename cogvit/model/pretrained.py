"""Checkpoints of transformers: where they lie, its causal language models, and its text encoders on packed captions.

transformers is imported inside functions, because without such an encoder the model needs torch and einops alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvit.batch import PackedText
from cogvit.config import RunConfig, TextEncoderConfig
from cogvit.errors import CheckpointError, ConfigError
from cogvit.model import byte_pairs
from cogvit.model.config import TextConfig
from cogvit.model.layouts.files import read_json

_CHECKPOINT_FILES = ["*.json", "*.safetensors"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_POOLERS = ("pooler", "head")  # what transformers calls what "own" pooling needs and the others do without


@dataclass(frozen=True)
class TextEncoderSpec:
    """What a checkpoint says about its text encoder, read without loading weights, and how its captions are pooled."""

    directory: Path
    config: Any  # of transformers
    model_class: Any  # likewise
    pooling: Literal["mean", "first", "last", "own"]
    pad_id: int  # of the tokenizer
    full_length: int  # tokens to which its own pooling wants every caption padded; 0: none

    def shape(self, max_tokens: int) -> TextConfig:
        """Return its size in our terms: for the cost of captions and for what tokenizers must fit."""
        width, heads = self.config.hidden_size, self.config.num_attention_heads
        sizes = (getattr(self.config, name, None) for name in ("intermediate_size", "d_ff", "hidden_dim"))
        hidden = next(filter(None, sizes), 4 * width)
        return TextConfig(
            vocab_size=self.config.vocab_size,
            max_tokens=max_tokens,
            embed_dim=width,
            depth=self.config.num_hidden_layers,
            num_heads=heads if width % heads == 0 else 1,
            mlp_ratio=hidden / width,
        )


class PretrainedText(nn.Module):
    """A transformers text encoder whose captions are pooled; it has no dropout, as none of the towers.

    Attributes:
        encoder: of transformers, in eval mode always.
        spec: what it is.
        dim: D, width of the pooled captions.
    """

    def __init__(self, encoder: nn.Module, spec: TextEncoderSpec) -> None:
        super().__init__()
        if spec.pooling != "own":
            for name in filter(encoder._modules.get, _POOLERS):
                setattr(encoder, name, nn.Identity())  # its weights would get no gradient
        self.encoder, self.spec = encoder.eval(), spec
        head = getattr(encoder, "head", None)
        self.dim: int = head.out_features if isinstance(head, nn.Linear) else spec.config.hidden_size

    def train(self, mode: bool = True) -> Self:
        """Set the mode of this module, not of the encoder."""
        self.training = mode
        return self

    def pool(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return [B, D] fp32 of token ids and their mask [B, L]; captions begin at the left."""
        valid, full_length, pad_id = attention_mask.bool(), self.spec.full_length, self.spec.pad_id
        ids = input_ids.where(valid, pad_id)
        if full_length:
            return self.encoder(
                input_ids=F.pad(ids, (0, full_length - ids.shape[1]), value=pad_id)
            ).pooler_output.float()
        output = self.encoder(input_ids=ids, attention_mask=valid.long())
        if self.spec.pooling == "own":
            return output.pooler_output.float()
        x_BLD, length_B = output.last_hidden_state.float(), valid.sum(1)
        if self.spec.pooling == "first":
            return x_BLD[:, 0]
        if self.spec.pooling == "last":
            return x_BLD[torch.arange(len(ids), device=ids.device), length_B - 1]
        return (x_BLD * valid.unsqueeze(2)).sum(1) / length_B.unsqueeze(1)

    def pool_packed(self, text: PackedText) -> Tensor:
        """Return [N, D] fp32 of a pack's captions, zeros where one is absent; they are padded to the pack's longest."""
        length_N = text.cu_seqlens[:-1].diff()
        here = length_N.nonzero().squeeze(1)
        pooled_ND = torch.zeros(len(length_N), self.dim, device=text.ids.device)
        if not len(here):
            return pooled_ND
        place_L = torch.arange(int(length_N.max()), device=text.ids.device)
        valid = place_L < length_N[here].unsqueeze(1)
        ids = torch.full(valid.shape, self.spec.pad_id, device=text.ids.device)
        ids[valid] = text.ids[: int(text.cu_seqlens[-2])]
        return pooled_ND.index_copy(0, here, self.pool(ids, valid))


class PretrainedTextTower(PretrainedText):
    """The same with the call of `TextTower`: the text encoder of `CogViTForContrastive`."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return [B, D] of token ids and their mask [B, L]; captions begin at the left."""
        return self.pool(input_ids, attention_mask)


def with_encoder_shape(config: RunConfig) -> RunConfig:
    """Return a run whose text.* says the shape of its transformers text encoder, where it has one.

    Errors: ConfigError when the checkpoint is no text encoder.
    """
    if not config.text_encoder.path:
        return config
    return replace(config, text=inspect_text_encoder(config.text_encoder).shape(config.text.max_tokens))


def inspect_text_encoder(config: TextEncoderConfig, pad_id: int = 0) -> TextEncoderSpec:
    """Read what a checkpoint (local directory or hub name) is. Errors: ConfigError when it is no text encoder."""
    import transformers

    directory = resolve(config.path, "--text-encoder.path")
    try:
        found = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _no_encoder(config.path, str(error).partition("\n")[0]) from None
    found = getattr(found, "text_config", found)  # of a model with two towers
    name = type(found).__name__.removesuffix("Config") + "Model"
    model_class = transformers.MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(found), getattr(transformers, name, None))
    if model_class is None or not hasattr(found, "vocab_size"):
        raise _no_encoder(config.path, f"its type is {found.model_type!r}")
    found.use_cache = False
    # SigLIP's pooling reads the last of a fixed number of tokens, padding included, which it was trained to see.
    fixed = config.pooling == "own" and found.model_type.startswith("siglip")
    full_length = found.max_position_embeddings if fixed else 0
    return TextEncoderSpec(directory, found, model_class, config.pooling, pad_id, full_length)


def load_text_encoder(config: TextEncoderConfig, max_tokens: int, pad_id: int) -> PretrainedTextTower:
    """Load an encoder in fp32, from safetensors and without remote code.

    Errors: ConfigError when the checkpoint is incomplete, or the encoder cannot take captions of max_tokens or has no
    pooling of its own where that is asked for.
    """
    from safetensors import SafetensorError

    spec = inspect_text_encoder(config, pad_id)
    weight_files(spec.directory, "--text-encoder.path")
    with quiet():
        try:
            encoder, report = spec.model_class.from_pretrained(
                spec.directory, config=spec.config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise _no_encoder(config.path, str(error).partition("\n")[0]) from None
    tower = PretrainedTextTower(encoder, spec)
    missing = sorted(set(report["missing_keys"]) & {name for name, _ in encoder.named_parameters()})
    if missing:
        kind = spec.model_class.__name__
        raise _no_encoder(config.path, f"it lacks {len(missing)} weights of a {kind}, {missing[0]} first")
    _try_out(tower, config.path, max_tokens)
    return tower


def new_text_encoder(config: TextEncoderConfig, pad_id: int) -> PretrainedTextTower:
    """Build an encoder for the weights of a run. Errors: as `inspect_text_encoder`."""
    spec = inspect_text_encoder(config, pad_id)
    with quiet():
        return PretrainedTextTower(spec.model_class(spec.config).float(), spec)


def inspect_causal_lm(directory: Path) -> Any:
    """Return the configuration of a causal language model of transformers, reading no weights.

    Errors: CheckpointError when it is none, reads more than text, or is quantized.
    """
    import transformers

    try:
        found = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # configurations that check their fields raise classes of their own
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{directory} is no language model that transformers knows: {reason}") from None
    kind = f"{directory} is of type {found.model_type!r}"
    if type(found) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or found.is_encoder_decoder:
        raise CheckpointError(f"{kind}, which is no causal language model of transformers")
    if found.get_text_config() is not found:
        raise CheckpointError(f"{kind}, which reads more than text; take the language model out of it")
    if getattr(found, "quantization_config", None) is not None:
        raise CheckpointError(f"{kind} and quantized; quantized models must be converted first")
    return found


def new_causal_lm(directory: Path) -> nn.Module:
    """Build a causal language model of transformers without its weights. Errors: as `inspect_causal_lm`."""
    import transformers

    model: nn.Module = transformers.AutoModelForCausalLM.from_config(inspect_causal_lm(directory))
    return model


def load_causal_lm(directory: Path, config: Any) -> nn.Module:
    """Load a causal language model in fp32 and eval mode, from safetensors and without remote code.

    config: what `inspect_causal_lm` gave. Errors: CheckpointError when the checkpoint is incomplete or does not fit it.
    """
    import transformers
    from safetensors import SafetensorError

    if not list(directory.glob("*.safetensors")):
        raise CheckpointError(f"{directory} has no *.safetensors; other formats can run code and are refused")
    with quiet():
        try:
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                directory, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError, ImportError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise CheckpointError(f"{directory} does not load: {reason}") from None
    missing = sorted(set(report["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if missing:
        raise CheckpointError(
            f"{directory} lacks {len(missing)} weights of a {type(model).__name__}, {missing[0]} first"
        )
    loaded: nn.Module = model.eval()
    return loaded


def load_tokenizer(directory: Path) -> Any:
    """Return the tokenizer of a checkpoint, without remote code; None where there is no file of one.

    Errors: CheckpointError when its files are damaged.
    """
    if not has_tokenizer(directory):
        return None
    import transformers

    if byte_pairs.has_ranks(directory):  # whose own code is not run
        said = read_json(directory / byte_pairs.CONFIG)
        named = {name: said[name] for name in ("eos_token", "pad_token") if isinstance(said.get(name), str)}
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=byte_pairs.read_tokenizer(directory), clean_up_tokenization_spaces=False, **named
        )
    try:
        return transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises a bare Exception on damaged files
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"the tokenizer of {directory} does not load: {reason}") from None


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds the files of a tokenizer."""
    return any((directory / name).exists() for name in _TOKENIZER_FILES)


def resolve(path: str, what: str) -> Path:
    """Return the directory of a checkpoint, downloading it when it is a hub name; `what` names it in errors."""
    check_location(path, what)
    if path and Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download  # a network client that local runs need not load

    try:
        return Path(snapshot_download(path, allow_patterns=_CHECKPOINT_FILES))
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{what} {path} is no directory here, and the hub did not give it: {reason}") from error


def check_location(path: str, what: str) -> None:
    """Look, without the network, whether a path is a directory or may be a hub name. Errors: ConfigError."""
    if not (path and Path(path).is_dir()) and not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise ConfigError(f"{what} {path!r} does not exist; pass a checkpoint directory or a hub name")


def weight_files(directory: Path, what: str) -> list[Path]:
    """Return the weights of a checkpoint. Errors: ConfigError when there are none in safetensors."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{what} {directory} has no *.safetensors; other formats can run code and are refused")
    return files


@contextmanager
def quiet() -> Iterator[None]:
    """Keep load reports and progress bars of transformers off the terminal; we check the reports ourselves."""
    import transformers

    log = transformers.utils.logging
    verbosity, progress = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if progress:
            log.enable_progress_bar()


def _no_encoder(path: str, reason: str) -> ConfigError:
    return ConfigError(f"--text-encoder.path {path} is no text encoder of transformers: {reason}")


@torch.no_grad()
def _try_out(tower: PretrainedTextTower, path: str, max_tokens: int) -> None:
    """Encode one caption of the greatest length. Errors: ConfigError when that does not work."""
    full_length = tower.spec.full_length
    if full_length and max_tokens > full_length:
        raise ConfigError(f"--text.max-tokens {max_tokens} is above the {full_length} of {path}; lower it")
    pad_id = getattr(tower.spec.config, "pad_token_id", None) or 0  # some count the positions of other tokens alone
    ids = torch.full((1, max_tokens), (pad_id + 1) % tower.spec.config.vocab_size)
    try:
        tower(ids, torch.ones_like(ids))
    except (IndexError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"--text-encoder.path {path} does not take --text.max-tokens {max_tokens}: {reason}; lower it"
        ) from None
    except (AttributeError, TypeError):
        raise _no_encoder(path, "it has no features of tokens, or not --text-encoder.pooling own") from None
