"""The fields of a run's configuration and their meaning: one frozen tree of dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cogvit.config.execution import (
    CheckpointConfig,
    EvalConfig,
    GuardConfig,
    LogConfig,
    MemoryConfig,
    ParallelConfig,
    ZeroConfig,
)
from cogvit.config.option import option
from cogvit.config.reinforcement import ReinforcementConfig
from cogvit.model.config import (
    AdapterConfig,
    CogViTConfig,
    CrossModuleConfig,
    ExpertConfig,
    MmtpConfig,
    TextConfig,
    VideoConfig,
)


@dataclass(frozen=True)
class DataConfig:
    """What is read, how it is sized and how much of it makes a step."""

    shards: str = option("", "glob, brace range or directory of webdataset shards, local, fsspec URL or pipe:COMMAND")
    eval_shards: str = option("", "held-out shards, for --eval.every-steps, evaluation and report")
    held_out: float = option(
        0.0, "share of data.shards that is kept out of training, by a hash of each image, where eval_shards names none"
    )
    index_dir: str = option("", "where SHARD.parquet lies; beside the shard if empty")
    cache_dir: str = option("", "directory on each node's own disk that remote shards are copied to, whole")
    cache_bytes: int = option(100_000_000_000, "the most that data.cache_dir may hold")
    order: Literal["planned", "sequential"] = option(
        "planned",
        "planned: by the index; sequential: shards as they lie, without an index, through webdataset, at reduced"
        " guarantees: shuffled and balanced only inside lookahead_steps of each rank, no mixture, batches depend on the"
        " number of ranks, and a resumed run begins the shards anew",
    )
    caption_field: str = option(
        "", "field of a sample's json that holds its captions, as in tools.index_shards; captions and caption if empty"
    )
    source_field: str = option("source", "sequential: field of a sample's json that names its source")
    where: str = option("", "a rule over the index for the samples to use, like 'width_px >= 64 and source != \"ads\"'")
    duplicates: Literal["drop", "keep"] = option("drop", "of images that are equal byte for byte, use the first or all")
    mixture: tuple[tuple[str, float], ...] = option((), "weights of the index's sources; by their sizes if empty")
    global_batch_images: int = option(256, "images of one optimizer step, over all ranks")
    batch_schedule: tuple[tuple[int, int], ...] = option(
        (), "[[STEP, IMAGES], ...]: global_batch_images from a step on; steps count from 0"
    )
    tokens_per_pack: int = option(4096, "T: patch tokens of one microbatch on one rank")
    images_per_pack: int = option(64, "N: image slots of one microbatch on one rank")
    text_tokens_per_pack: int = option(
        4096, "L or S: tokens of captions, or of the language model, of one microbatch on one rank"
    )
    full_packs: bool = option(
        True, "packs always have their full size; false: as many rows as they need, which spares padding (pp 1)"
    )
    sizing: Literal["square", "naflex", "glm"] = option(
        "naflex",
        "resize to vision.image_size squares, or keep the aspect; glm: as GLM-OCR's processor, near the native size, in"
        " whole groups of data.grid_multiple",
    )
    min_patches: int = option(0, "glm: smaller images are enlarged to so many patches")
    max_patches: int = option(256, "naflex and glm: the largest grid an image may have, in patches")
    budgets_patches: tuple[int, ...] = option(
        (), "naflex, glm: each image gets one of these budgets in each epoch, drawn by its key; max_patches if none"
    )
    budget_schedule: tuple[tuple[int, tuple[int, ...]], ...] = option(
        (), "[[STEP, [PATCHES, ...]], ...]: budgets_patches from a step on; steps count from 0"
    )
    enlarge: bool = option(False, "naflex: enlarge images that are smaller than max_patches")
    grid_multiple: int = option(1, "naflex, glm: sides are multiples of it (2: a language model's 2 x 2 groups)")
    topology: str = option("", "file of 'HOST ADDRESS' lines; SLURM_TOPOLOGY_ADDR or the host's name if empty")
    canonical_shares: int = option(
        24, "C: equal-cost shares of a global batch, fixed for the life of a run; best where the nodes divide it"
    )
    lookahead_steps: int = option(16, "shuffle window of the plan, in steps")
    flip: bool = option(False, "mirror half of the images, seeded by sample and epoch")
    crop: float = option(1.0, "cut out a drawn share of each image's area, of its aspect, from this up to 1; 1: off")
    color: float = option(0.0, "change brightness, contrast and saturation by a drawn share, up to this; 0: off")
    zh_fraction: float = option(0.5, "share of Chinese captions where a sample has both languages")
    tokenizer: str = option("byt5", "byt5 (bytes, needs no files), or a transformers tokenizer by name or path")
    prefetch_steps: int = option(2, "steps decoded ahead")
    decode_threads: int = option(1, "threads that decode images, for each rank")
    loading: Literal["in_process", "server"] = option(
        "in_process", "who makes the batches: each rank for itself, or an actor on each node for its ranks, through Ray"
    )
    max_wait_s: float = option(300.0, "loading server: a rank that waits longer for a batch takes its actor for hung")
    max_bad_fraction: float = option(0.01, "stop when more of the images than this fail to decode")


SUMMARY = "_summary"  # ends the name of what is regressed once an image, not once a masked patch


@dataclass(frozen=True)
class TeacherConfig:
    """One frozen teacher."""

    name: str = option("", "its name in losses and logs")
    path: str = option(
        "",
        "directory or hub name of a transformers checkpoint (siglip2, siglip or dinov3_vit), or package.module:function"
        " that returns a cogvit.TeacherWrapper around any module",
    )
    layer: int = option(
        -1, "block whose output, through the teacher's last norm, is regressed: -1 the last, -2 the one before it"
    )
    weight: float = option(1.0, "weight of the loss of its patches; 0 leaves them out")
    summary_weight: float = option(
        0.0, "weight of the loss of its summary (CLS, pooled output or mean); 0 leaves it out"
    )
    error: Literal["smooth_l1", "cosine", "mse"] = option(
        "smooth_l1", "what its loss measures: mean over the channels, or 1 - cos"
    )

    @property
    def parts(self) -> dict[str, float]:
        """Weights of what is regressed: "" for its patches, SUMMARY for its summary; behind its name, a loss's name."""
        weights = {"": self.weight, SUMMARY: self.summary_weight}
        return {part: weight for part, weight in weights.items() if weight > 0.0}


@dataclass(frozen=True)
class TeachersConfig:
    """The frozen teachers of stage 1 and where their features come from."""

    members: tuple[TeacherConfig, ...] = option((), "the teachers; a member's flag is --teachers.members.NAME.path")
    source: Literal["online", "store", "store_then_online"] = option(
        "online", "Ray actors, a feature store, or the store and for shards that it lacks the actors"
    )
    store: str = option("", "directory of tools/precompute_features")
    mask_ratio: float = option(0.35, "share of each image's patches that is masked, exact per image")
    visible_weight: float = option(
        0.0,
        "weight of the loss at the patches that the student sees, beside 1 at those that are masked; 0: as the paper,"
        " which says nothing of what the encoder gives where nothing is masked, and a third of the features to send",
    )
    actors_per_teacher: int = option(1, "Ray actors that serve each teacher, spread over the nodes of the cluster")
    actor_cpus: float = option(1.0, "CPUs that an actor takes, and its threads, which may change features' last bits")
    actor_gpus: float = option(0.0, "GPUs that it takes: a fraction shares one, 0 is the CPU, with other last bits")
    share_gpus: bool = option(False, "an actor may lie on a GPU on which a rank trains")
    in_flight_steps: int = option(2, "steps whose features are requested ahead")
    max_in_flight_bytes: int = option(
        128 * 2**20, "a rank sends actors no further request while it waits for this many bytes of features"
    )
    max_wait_s: float = option(300.0, "how long a rank waits for features before the run stops")
    precision: Literal["fp32", "bf16"] = option("fp32", "of the teachers' forward")
    compile: bool = option(False, "torch.compile the teachers")
    stats: str = option(
        "", "file of tools.fit_teacher_stats to standardize with; fitted by the first start of the run if empty"
    )
    stats_images: int = option(
        4096, "stats empty: how many training images the first start fits on, rounded up to a pack; an epoch at most"
    )
    standardize: Literal["channel", "phi_s"] = option(
        "channel", "mean 0 and deviation 1: each channel on its own, or by a rotation and one scale (PHI-S)"
    )
    ray_address: str = option(
        "",
        "Ray cluster to join, for data.loading server too; starts one on this machine if empty. Start one with a token:"
        " RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=FILE ray start --head --include-dashboard=false",
    )

    @property
    def asked_ratio(self) -> float:
        """The share of the patches whose features are asked for."""
        return self.mask_ratio if self.visible_weight == 0.0 else 1.0

    @property
    def num_actors(self) -> int:
        """How many actors serve a run."""
        return len(self.members) * self.actors_per_teacher


@dataclass(frozen=True)
class ContrastConfig:
    """The sigmoid loss of stage 2."""

    loss: Literal["ring", "gather"] = option(
        "ring", "how ranks meet each other's texts: passed around by groups of ranks, or all gathered"
    )
    group_ranks: int = option(
        0, "dp ranks that gather their texts and pass them on together (loss=ring); 0: enough for 1,024 texts"
    )
    chunk_pairs: int = option(1024, "rows and columns of the largest block of logits; bounds the memory of the loss")
    leave_out: Literal["concepts", "captions", "none"] = option(
        "concepts",
        "pairs that are no negatives: of samples with equal captions in all languages (translations of each other) or"
        " the same caption; the latter alone; none, as the paper",
    )
    max_temperature: float = option(1000.0, "the learned temperature counts as this where it is higher")


@dataclass(frozen=True)
class TextEncoderConfig:
    """A text encoder of transformers in place of our own text tower (stage 2)."""

    path: str = option(
        "",
        "directory or hub name of a transformers text encoder; it takes the place of the tower that text.* describes",
    )
    pooling: Literal["mean", "first", "last", "own"] = option(
        "mean", "of a caption's tokens: the mean, the first (BERT's CLS), the last, or the encoder's own pooling"
    )


@dataclass(frozen=True)
class ModuleConfig:
    """How one module of the model departs from the run's rates."""

    lr_mult: float = option(1.0, "its rates as multiples of optim.lr and optim.adamw_lr; stage 2 locks a tower of 0")
    weight_decay: float | None = option(None, "of its matrices; optim.weight_decay if none")
    schedule: Literal["cosine", "linear", "constant", "wsd"] | None = option(None, "its decay; schedule.kind if none")
    final_fraction: float | None = option(
        None, "its last rate as a fraction of the peak; schedule.final_fraction if none"
    )


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer; the modules' own settings are multiples of it or replace it."""

    name: Literal["muon", "adamw", "sgd"] = option("muon", "muon: Muon for matrices of blocks, AdamW for the rest")
    lr: float = option(1e-3, "rate of matrices (muon), or of everything (adamw, sgd)")
    adamw_lr: float = option(1e-3, "muon: rate of what Muon does not handle")
    weight_decay: float = option(
        0.05, "of every matrix; vectors, norms, biases, tables of embeddings and scalars have none"
    )
    momentum: float = option(0.95, "muon and sgd")
    muon_qkv: Literal["split", "heads", "fused"] = option(
        "split", "what of the fused q, k, v matrix Muon makes orthogonal: each of the three, each head's, or the whole"
    )
    muon_tp: Literal["gather", "sharded"] = option(
        "gather", "matrices split over tp: every rank orthogonalizes the whole, or its shard with shared Gram matrices"
    )
    beta1: float = option(0.9, "adamw")
    beta2: float = option(0.95, "adamw")
    eps: float = option(1e-8, "adamw")
    clip_norm: float = option(1.0, "global gradient norm; 0 turns clipping off")
    vision: ModuleConfig = field(default_factory=ModuleConfig)
    text: ModuleConfig = field(default_factory=ModuleConfig)
    projection: ModuleConfig = field(default_factory=ModuleConfig)  # and distillation heads
    temperature: ModuleConfig = field(default_factory=ModuleConfig)  # of the sigmoid loss
    bias: ModuleConfig = field(default_factory=ModuleConfig)  # of the sigmoid loss
    adapter: ModuleConfig = field(default_factory=ModuleConfig)  # between vision tower and language model
    language: ModuleConfig = field(default_factory=ModuleConfig)
    expert: ModuleConfig = field(default_factory=ModuleConfig)  # visual experts of the language model
    cross: ModuleConfig = field(default_factory=ModuleConfig)  # second encoder, and cross attention to it


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning-rate schedule."""

    steps: int = option(1000, "optimizer steps of the run")
    warmup_steps: int = option(100, "linear warm-up from 0")
    kind: Literal["cosine", "linear", "constant", "wsd"] = option(
        "cosine", "decay after the warm-up; wsd: constant, then linear over the last decay_fraction"
    )
    final_fraction: float = option(0.0, "rate at the end as a fraction of the peak")
    decay_fraction: float = option(0.2, "wsd: share of the steps, at the end, in which the rate decays")


@dataclass(frozen=True)
class LanguageTowerConfig:
    """The language model of stage 3, and what of a sample it reads."""

    path: str = option(
        "",
        "directory of a causal language model of transformers with its tokenizer: Llama, GLM-4 or Qwen3; any other lies"
        " whole on the last pipeline stage, without tensor ranks, recompute and heads for more tokens",
    )
    max_tokens: int = option(1024, "longest sample, images included; a longer one loses its end")
    max_patches: int = option(4096, "of all images of a sample together; several images are shown smaller")
    prompts: tuple[tuple[str, str], ...] = option(
        (("en", "What is this?"), ("zh", "这是什么")), "what a caption answers, by language; without one, nothing"
    )


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run."""

    objective: Literal["distill", "contrast", "language", "policy"] = option("distill", "stage 1, 2, 3 or 4")
    vision: CogViTConfig = field(default_factory=CogViTConfig)
    text: TextConfig = field(default_factory=TextConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    language: LanguageTowerConfig = field(default_factory=LanguageTowerConfig)
    mmtp: MmtpConfig = field(default_factory=MmtpConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    expert: ExpertConfig = field(default_factory=ExpertConfig)
    cross: CrossModuleConfig = field(default_factory=CrossModuleConfig)
    rl: ReinforcementConfig = field(default_factory=ReinforcementConfig)
    proj_dim: int = option(768, "width of the shared image-text space (stage 2)")
    init_log_t: float = option(2.302585092994046, "log temperature at the start (stage 2)")
    init_bias: float | None = option(
        None, "bias of the sigmoid loss at the start (stage 2); minus the logarithm of the global batch if none"
    )
    data: DataConfig = field(default_factory=DataConfig)
    teachers: TeachersConfig = field(default_factory=TeachersConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    precision: Literal["fp32", "bf16"] = option("fp32", "bf16: fp32 parameters under autocast")
    device: Literal["auto", "cuda", "cpu"] = option(
        "auto",
        "auto: a GPU where there is one; refused where Slurm gave GPUs or nvidia-smi lists some and torch sees none",
    )
    deterministic: bool = option(
        False, "a repeated run has the same bits on GPUs too, at a cost; what cannot repeat itself is refused"
    )
    fusion: Literal["auto", "on", "off"] = option(
        "auto", "norms, rotations, activations and residual branches as one compiled kernel each; auto: on CUDA"
    )
    out: str = option("", "run directory")
    init: str = option("", "run or export whose weights the run starts from")
    seed: int = option(0, "of weights, plan, masks and every other draw")
