"""What a user of PyTorch would run instead, in the shapes of examples/bench.rs: the same JSON rows on standard output.

python bench/peers.py [--quick]. Needs PyTorch with CUDA. Times are medians between device events, inputs rotated.
"""

import argparse
import json

import torch

TOKENS, BAG, SETS = 4096, 128, 4
HEADS, SUB_KEYS, HALF, TOP_K = 4, 1024, 256, 32


def median_ms(call, repeats):
    for s in range(SETS):
        call(s)
    torch.cuda.synchronize()
    marks = []
    for i in range(repeats):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        call(i % SETS)
        b.record()
        marks.append((a, b))
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in marks)[repeats // 2]


def report(op, fmt, ids, tokens, width, slots, ms, moved=0.0):
    row = dict(by="torch", op=op, format=fmt, ids=ids, tokens=tokens, width=width, slots=slots, ms=round(ms, 5))
    row["gb_s"] = round(moved / ms / 1e6, 1)
    print(json.dumps(row), flush=True)


def id_sets(slots):
    g = torch.Generator("cuda").manual_seed(1)
    return [torch.randint(slots, (TOKENS, BAG), device="cuda", generator=g) for _ in range(SETS)]


def bags(width, slots, dtype, repeats):
    name = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    table = torch.randn(slots, width, device="cuda", dtype=dtype)
    weights = torch.randn(TOKENS, BAG, device="cuda", dtype=dtype)
    sets = id_sets(slots)
    call = lambda s: torch.nn.functional.embedding_bag(sets[s], table, per_sample_weights=weights, mode="sum")
    moved = TOKENS * BAG * (width * table.element_size() + 8) + TOKENS * width * 4
    report("bag_sum", name, "uniform", TOKENS, width, slots, median_ms(call, repeats), moved)


def step(width, slots, kind, repeats):
    """Forward, backward and optimizer step. Weights get no gradient: PyTorch has none in bf16."""
    dtype = torch.bfloat16 if kind == "adamw" else torch.float32
    table = torch.nn.Parameter(torch.randn(slots, width, device="cuda", dtype=dtype))
    sparse = kind == "sparseadam"
    optimizer = torch.optim.SparseAdam([table], lr=1e-3) if sparse else torch.optim.AdamW([table], lr=1e-3, fused=True)
    weights = torch.randn(TOKENS, BAG, device="cuda", dtype=dtype)
    dout = torch.randn(TOKENS, width, device="cuda", dtype=dtype)
    sets = id_sets(slots)

    def call(s):
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.embedding_bag(
            sets[s], table, per_sample_weights=weights, mode="sum", sparse=sparse
        ).backward(dout)
        optimizer.step()

    name = "bf16" if dtype == torch.bfloat16 else "f32"
    report(f"step ({kind})", name, "uniform", TOKENS, width, slots, median_ms(call, repeats))


def select(tokens, dtype, repeats):
    keys = torch.randn(HEADS, 2, SUB_KEYS, HALF, device="cuda", dtype=dtype)
    queries = [torch.randn(tokens, HEADS, 2, HALF, device="cuda", dtype=dtype) for _ in range(SETS)]

    def call(s):
        scores = torch.einsum("thpc,hpnc->thpn", queries[s], keys)
        best, at = scores.topk(TOP_K, dim=-1)
        pairs = (best[:, :, 0, :, None] + best[:, :, 1, None, :]).flatten(2)
        ids = (at[:, :, 0, :, None] * SUB_KEYS + at[:, :, 1, None, :]).flatten(2)
        score, at = pairs.topk(TOP_K, dim=-1)
        return ids.gather(-1, at), score.float().softmax(-1)

    name = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    report("select", name, "-", tokens, HALF, SUB_KEYS**2, median_ms(call, repeats))


def attempt(call, *args):
    """A shape that does not fit into memory is a result too."""
    try:
        call(*args)
    except torch.cuda.OutOfMemoryError:
        print(json.dumps(dict(by="torch", op=call.__name__, args=[str(a) for a in args], error="out of memory")))
    torch.cuda.empty_cache()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    repeats = 8 if parser.parse_args().quick else 24
    torch.backends.cuda.matmul.allow_tf32 = False
    x = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    y = torch.empty_like(x)
    report("copy", "-", "-", 0, 0, 0, median_ms(lambda s: y.copy_(x), repeats), 2.0 * x.numel())
    for tokens in (1, 32, TOKENS, 32768):
        for dtype in (torch.float32, torch.bfloat16):
            attempt(select, tokens, dtype, repeats)
    for width in (100, 256, 1000, 1024, 4096):
        attempt(bags, width, 1 << 20, torch.bfloat16, repeats)
    attempt(bags, 1024, 1 << 20, torch.float32, repeats)
    attempt(bags, 1024, 1 << 22, torch.bfloat16, repeats)
    for width, slots in ((256, 1 << 20), (1024, 1 << 20), (4096, 1 << 20), (1024, 1 << 22), (1024, 1 << 24)):
        attempt(step, width, slots, "adamw", repeats)
        attempt(step, width, slots, "sparseadam", repeats)


if __name__ == "__main__":
    main()
