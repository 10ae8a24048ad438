"""One call of generate.py: the model, its text on blocks, and the same on the library's own cache.

    run(build_parser().parse_args(["--beams", "4"]))     # prints; 0 if the texts are the same

Whatever can be refused is refused before the weights are loaded, and all of it before a token is
generated; files are written after the last one.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel, StaticCache

from kv_cache_manager import POLICIES, BaselineCacheManager, MemoryUsage, OutOfBlocksError
from paged_attention import (
    DeviceMemoryError,
    KernelError,
    check_device_memory,
    choose_device,
    choose_kernel,
)
from vllm_sim.engine.block_cache import CACHE
from vllm_sim.engine.paged_cache import PagedCache
from vllm_sim.engine.ranks import RankLostError, Ranks, RanksDifferError, join
from vllm_sim.engine.report import Generated, lines, tables
from vllm_sim.engine.support import UnsupportedModelError, heads
from vllm_sim.engine.tensor_parallel import RanksCache, shard
from vllm_sim.engine.weights import Tokenizer, dtype_on, find_source, first_line
from vllm_sim.playback import timeline
from vllm_sim.playback.recorder import Recorder
from vllm_sim.reporting.command_line import UsageError, raise_on_interrupt
from vllm_sim.reporting.documents import document
from vllm_sim.reporting.files import check_writable, write_json
from vllm_sim.reporting.progress import Progress


@dataclass
class Watch:
    """Told of every forward: checks the manager, and keeps what is shown and played back."""

    recorder: Recorder | None
    progress: Progress
    num_steps: int  # expected
    fullest: MemoryUsage | None = None
    num_forwards: int = field(default=0)

    def __call__(self, cache: PagedCache) -> None:
        cache.manager.check_invariants()
        usage = cache.usage()
        if self.fullest is None or usage.physical_blocks >= self.fullest.physical_blocks:
            self.fullest = usage
        if cache.moved:
            title = f"beams move after token {self.num_forwards}"
        else:
            self.num_forwards += 1
            title = f"token {self.num_forwards}"
            self.progress.at(self.num_forwards, self.num_steps, title)
        if self.recorder is not None:
            self.recorder.step(title, cache.copies, cache.forked, cache.moved)


def run(args: argparse.Namespace) -> int:
    """Generate and show; 0 if the text is that of the library's own cache.

    Raises UsageError for what cannot be used, or needs more memory than there is.
    """
    try:
        with ExitStack() as stack:
            if args.tensor_parallel:
                ranks = stack.enter_context(join(args.device))
            else:
                ranks = Ranks(0, 1, choose_device(args.device))
            if ranks.rank:  # the first one shows, and writes
                args = argparse.Namespace(**{**vars(args), "json": None, "timeline": None})
            quiet = args.quiet or ranks.rank > 0
            progress = Progress.on(sys.stderr, "generate.py", quiet=quiet)
            return run_and_show(args, ranks, stack.enter_context(progress))
    except (UnsupportedModelError, KernelError, RankLostError, RanksDifferError) as error:
        raise UsageError(str(error)) from None
    except OutOfBlocksError as error:
        raise UsageError(f"the pool is too small: {error}; raise --num-blocks") from None
    except DeviceMemoryError as error:
        raise UsageError(f"{error}; lower --num-blocks or --block-size") from None
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UsageError(f"out of memory: {first_line(error)}") from None


def run_and_show(args: argparse.Namespace, ranks: Ranks, progress: Progress) -> int:
    """What can be refused, then the work, then what was found."""
    if args.json is not None:
        check_writable(args.json)
    device = ranks.device
    source = find_source(args.model)
    choose_kernel(args.kernel, device, *heads(source.config))
    progress.at(0, 1, "tokenizer")
    tokenizer = source.tokenizer()
    prompt = tokenizer.encode(args.prompt)
    check_prompt(source.config, prompt, args.max_new_tokens)
    num_seqs = args.samples or args.beams or 1
    blocks = -(-(len(prompt) + args.max_new_tokens - 1) // args.block_size)
    num_blocks = args.num_blocks or num_seqs * blocks
    if blocks > num_blocks:
        raise UsageError(
            f"the pool is too small: one sequence of {len(prompt)} + {args.max_new_tokens} tokens "
            f"takes {blocks} blocks; raise --num-blocks"
        )
    size = pool_bytes(source.config, num_blocks * args.block_size, device) // ranks.size
    check_device_memory(size, device)
    if args.timeline is not None:
        timeline.check(args.timeline, num_blocks)
    raise_on_interrupt()
    start = time.perf_counter()
    progress.at(0, 1, "weights")
    model = source.model(device, args.seed, partial(shard, ranks=ranks) if ranks.size > 1 else None)
    about = f"{len(prompt)} tokens of prompt, its chat template included, "
    about += f"at most {args.max_new_tokens} new ones"
    found = measure(args, model, ranks, prompt, tokenizer, num_blocks, about, progress)
    generated, recorder = found
    progress.clear()
    if ranks.rank:
        return 0 if generated.ok else 1
    if ranks.size > 1:
        about += f"; on {ranks.size} ranks, bytes are of one"
    told = replace(generated, setting=f"{source.about}; {generated.setting}; {about}")
    for line in lines(told, args.format):
        print(line)
    write_outputs(args, told, recorder, time.perf_counter() - start)
    return 0 if told.ok else 1


def measure(
    args: argparse.Namespace,
    model: PreTrainedModel,
    ranks: Ranks,
    prompt: list[int],
    tokenizer: Tokenizer,
    num_blocks: int,
    about: str,
    progress: Progress,
) -> tuple[Generated, Recorder | None]:
    """The text on blocks, the same on the library's caches, and what each of them takes."""
    own_attention = model.config._attn_implementation
    num_seqs = args.samples or args.beams or 1
    watch = Watch(None, progress, args.max_new_tokens)
    options = {"width": num_seqs, "kernel": args.kernel, "poison": True, "on_step": watch}
    new = partial(RanksCache, ranks=ranks) if ranks.size > 1 else PagedCache
    cache = new(model, num_blocks, args.block_size, **options)
    if args.timeline is not None:
        kind = "parallel" if args.samples else "beam" if args.beams else "single"
        watch.recorder = Recorder("generate.py", about, cache.manager, kind=kind)
    found = generate(model, prompt, args, cache)
    model.set_attn_implementation(own_attention)
    dynamic = DynamicCache(config=model.config.get_text_config(decoder=True))
    progress.at(0, 1, "the library's own cache")
    same = generate(model, prompt, args, dynamic)
    static = StaticCache(model.config, max_cache_len=len(prompt) + args.max_new_tokens)
    generate(model, prompt, args, static, max_new_tokens=1)  # it takes all of its memory at once

    new_tokens = [len(tokens) for tokens in found]
    longest = max_length(model.config) or len(prompt) + args.max_new_tokens
    lengths = longest, len(prompt), new_tokens, cache.pool.bytes_per_token
    pool = "" if args.num_blocks else ", what the sequences take without sharing"
    kernel = f"{cache.kernel} kernel" + f" ({cache.why_not_triton})" * bool(cache.why_not_triton)
    dtype = str(cache.pool.dtype).removeprefix("torch.")
    generated = Generated(
        setting=f"{cache.num_layers} layers, {dtype} on {model.device.type}, {kernel}; "
        f"{num_blocks} blocks of {args.block_size} slots{pool}",
        texts=[tokenizer.decode(tokens) for tokens in found],
        num_prompt_tokens=len(prompt),
        num_new_tokens=new_tokens,
        fullest=watch.fullest,
        last=cache.usage(),
        num_copies=cache.num_copies,
        num_forwards=watch.num_forwards,
        bytes_held={
            "paged, blocks in use": watch.fullest.physical_blocks * cache.pool.bytes_per_block,
            **{
                f"contiguous, Orca ({policy.title()})": contiguous_bytes(policy, *lengths)
                for policy in reversed(POLICIES)
            },
            "the library's own, growing": held_bytes(dynamic),
            "the library's own, static": held_bytes(static),
        },
        same_texts=sum(map(list.__eq__, found, same)),
        exact=cache.pool.dtype == torch.float32,
    )
    return generated, watch.recorder


def pool_bytes(config: PretrainedConfig, num_slots: int, device: torch.device) -> int:
    """Bytes of K and V of so many slots in all layers, in the dtype that weights get there."""
    _, num_kv_heads, head_size = heads(config)
    layers = config.get_text_config(decoder=True).num_hidden_layers
    return num_slots * layers * 2 * num_kv_heads * head_size * dtype_on(device).itemsize


def check_prompt(config: PretrainedConfig, prompt: list[int], max_new_tokens: int) -> None:
    """UsageError for more tokens than the model has positions, or for none that it knows."""
    most = max_length(config)
    if most is not None and len(prompt) + max_new_tokens > most:
        raise UsageError(
            f"{len(prompt)} tokens of prompt and {max_new_tokens} new ones: "
            f"the model has {most} positions"
        )
    vocabulary = config.get_text_config(decoder=True).vocab_size
    if not prompt or max(prompt) >= vocabulary:
        raise UsageError(f"the tokenizer is not the model's: it has tokens 0 to {vocabulary - 1}")


def max_length(config: PretrainedConfig) -> int | None:
    """Positions that the model has, in tokens; None if it does not say."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def generate(
    model: PreTrainedModel, prompt: list[int], args: argparse.Namespace, cache, **options
) -> list[list[int]]:
    """The new tokens of each text, with this cache; the same draws whatever the cache."""
    ids = torch.tensor([prompt], device=model.device)
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": False, **options}
    if args.samples:
        options |= {"do_sample": True, "num_return_sequences": args.samples}
    elif args.beams:
        options |= {"num_beams": args.beams, "num_return_sequences": args.beams}
    eos = model.generation_config.eos_token_id
    ends = {eos} if isinstance(eos, int) else {*(eos or ())}
    options["pad_token_id"] = next(iter(ends), 0)
    torch.manual_seed(args.seed)
    mask = torch.ones_like(ids)
    found = model.generate(ids, attention_mask=mask, **{CACHE: cache}, **options)
    return [_until_end(row[len(prompt) :], ends) for row in found.tolist()]


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    """Without the padding behind the token that ends it."""
    for index, token in enumerate(tokens):
        if token in ends:
            return tokens[: index + 1]
    return tokens


def contiguous_bytes(
    policy: str, max_len: int, prompt_len: int, new_tokens: list[int], per_token: int
) -> int:
    """Bytes that contiguous reservations of one prompt and these new tokens take (Fig. 2)."""
    room = len(new_tokens) << (max_len - 1).bit_length()  # a chunk of the buddy allocator each
    manager = BaselineCacheManager(room, 1, policy=policy, max_len=max_len)
    for seq_id, new in enumerate(new_tokens):
        manager.allocate(seq_id, prompt_len, prompt_len + new)
    usage = manager.usage()
    return (usage.capacity - usage.free) * per_token


def held_bytes(cache: DynamicCache | StaticCache) -> int:
    """Bytes of all tensors of K and V that a cache of the library holds."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def write_outputs(
    args: argparse.Namespace, generated: Generated, recorder: Recorder | None, elapsed_s: float
) -> None:
    """The files that --json and --timeline name. Raises OutputError."""
    if args.json is not None:
        found = document(
            "generate.py",
            vars(args),
            seeds=[args.seed],
            setting={"told": generated.setting, "prompt_tokens": generated.num_prompt_tokens},
            texts=list(generated.texts),
            new_tokens=list(generated.num_new_tokens),
            num_copies=generated.num_copies,
            tables=[table.to_json() for table in tables(generated)],
            checks=[generated.check()],
            exit_code=0 if generated.ok else 1,
            elapsed_s=elapsed_s,
        )
        write_json(args.json, found)
    if args.timeline is not None:
        timeline.write(args.timeline, generated.setting, [recorder.recording()])
