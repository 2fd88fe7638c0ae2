"""What a user of PyTorch would run instead, in the cases of `memlayer-bench cuda`: JSON rows on standard output.

python cuda.py [--quick] [--only TEXT]. Needs PyTorch with CUDA; Triton for the kernels, which are written here from the paper's
description of its three ways backward (atomics, locks, reverse indices). Times are medians between device events, inputs
rotated; a result is checked once before it is timed.
"""

import argparse
import json

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

TOKENS, BAG, SETS = 4096, 128, 4
HEADS, SUB_KEYS, HALF, TOP_K = 4, 1024, 256, 32
REPEATS = 24


def median_ms(call):
    for s in range(SETS):
        call(s)
    torch.cuda.synchronize()
    marks = []
    for i in range(REPEATS):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        call(i % SETS)
        b.record()
        marks.append((a, b))
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in marks)[REPEATS // 2]


def report(by, op, formats, ids, tokens, width, slots, ms):
    for fmt in formats:
        row = dict(by=by, op=op, format=fmt, ids=ids, tokens=tokens, width=width, slots=slots)
        print(json.dumps(row | dict(ms=None if ms is None else round(ms, 5))), flush=True)


def measured(by, op, formats, ids, tokens, width, slots, make):
    """Times what `make` gives; a shape that does not fit into memory is a result too."""
    try:
        ms = median_ms(make())
    except torch.cuda.OutOfMemoryError:
        ms = None
    report(by, op, formats, ids, tokens, width, slots, ms)
    torch.cuda.empty_cache()


def id_sets(tokens, slots, zipf=False):
    g = torch.Generator("cuda").manual_seed(1)
    if not zipf:
        return [torch.randint(slots, (tokens, BAG), device="cuda", generator=g) for _ in range(SETS)]
    ranks = lambda: (torch.rand(tokens, BAG, device="cuda", generator=g, dtype=torch.float64) * torch.log(torch.tensor(slots)).item())
    return [((ranks().exp().long() - 1) * 0x9E3779B1) % slots for _ in range(SETS)]


if triton is not None:

    @triton.jit
    def sum_kernel(table, ids, weights, out, width, bag: tl.constexpr, block: tl.constexpr):
        token = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * block + tl.arange(0, block)
        inside = column < width
        total = tl.zeros([block], tl.float32)
        for entry in range(bag):
            row = tl.load(ids + token * bag + entry).to(tl.int64)
            weight = tl.load(weights + token * bag + entry).to(tl.float32)
            total += weight * tl.load(table + row * width + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def dot_kernel(table, ids, dout, dweights, width, bag: tl.constexpr, block: tl.constexpr):
        token = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, block)
        inside = column < width
        gradient = tl.load(dout + token * width + column, mask=inside, other=0.0).to(tl.float32)
        for entry in range(bag):
            row = tl.load(ids + token * bag + entry).to(tl.int64)
            values = tl.load(table + row * width + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(dweights + token * bag + entry, tl.sum(values * gradient).to(dweights.dtype.element_ty))

    @triton.jit
    def atomics_kernel(ids, weights, dout, grad, width, bag: tl.constexpr, block: tl.constexpr):
        token = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, block)
        inside = column < width
        gradient = tl.load(dout + token * width + column, mask=inside, other=0.0).to(tl.float32)
        for entry in range(bag):
            row = tl.load(ids + token * bag + entry).to(tl.int64)
            weight = tl.load(weights + token * bag + entry).to(tl.float32)
            part = (weight * gradient).to(grad.dtype.element_ty)
            tl.atomic_add(grad + row * width + column, part, mask=inside, sem="relaxed")

    @triton.jit
    def locks_kernel(ids, weights, dout, grad, locks, width, bag: tl.constexpr, block: tl.constexpr):
        token = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, block)
        inside = column < width
        gradient = tl.load(dout + token * width + column, mask=inside, other=0.0).to(tl.float32)
        for entry in range(bag):
            row = tl.load(ids + token * bag + entry).to(tl.int64)
            weight = tl.load(weights + token * bag + entry).to(tl.float32)
            place = grad + row * width + column
            while tl.atomic_cas(locks + row, 0, 1) == 1:
                pass
            before = tl.load(place, mask=inside, other=0.0, volatile=True).to(tl.float32)
            tl.store(place, (before + weight * gradient).to(grad.dtype.element_ty), mask=inside)
            tl.debug_barrier()
            tl.atomic_xchg(locks + row, 0)

    @triton.jit
    def reverse_kernel(rows, starts, entries, weights, dout, grad, width, bag: tl.constexpr, block: tl.constexpr):
        unique = tl.program_id(0)
        column = tl.arange(0, block)
        inside = column < width
        row = tl.load(rows + unique).to(tl.int64)
        total = tl.zeros([block], tl.float32)
        for at in range(tl.load(starts + unique), tl.load(starts + unique + 1)):
            entry = tl.load(entries + at).to(tl.int64)
            weight = tl.load(weights + entry).to(tl.float32)
            source = tl.load(dout + entry // bag * width + column, mask=inside, other=0.0)
            total += weight * source.to(tl.float32)
        tl.store(grad + row * width + column, total.to(grad.dtype.element_ty), mask=inside)


def warps(block):
    return max(1, min(8, block // 256))


def triton_sum(table, ids, weights, out):
    block = min(1024, triton.next_power_of_2(out.shape[1]))
    grid = (ids.shape[0], triton.cdiv(out.shape[1], block))
    sum_kernel[grid](table, ids, weights, out, out.shape[1], BAG, block, num_warps=warps(block))


def triton_backward(kind, table, ids, weights, dout, grad, dweights, locks):
    width = dout.shape[1]
    block = triton.next_power_of_2(width)
    options = dict(num_warps=warps(block))
    dot_kernel[(ids.shape[0],)](table, ids, dout, dweights, width, BAG, block, **options)
    grad.zero_()
    if kind == "atomics":
        atomics_kernel[(ids.shape[0],)](ids, weights, dout, grad, width, BAG, block, **options)
    elif kind == "locks":
        locks_kernel[(ids.shape[0],)](ids, weights, dout, grad, locks, width, BAG, block, **options)
    else:
        rows, entries = ids.view(-1).sort(stable=True)
        rows, counts = rows.unique_consecutive(return_counts=True)
        starts = F.pad(counts.cumsum(0), (1, 0))
        reverse_kernel[(rows.numel(),)](rows, starts, entries, weights, dout, grad, width, BAG, block, **options)


def check():
    """The kernels' results are those of PyTorch in f64."""
    table = torch.randn(1000, 100, device="cuda")
    ids = torch.randint(1000, (64, BAG), device="cuda")
    weights, dout = torch.randn(64, BAG, device="cuda"), torch.randn(64, 100, device="cuda")
    out, dweights = torch.empty_like(dout), torch.empty_like(weights)
    triton_sum(table, ids, weights, out)
    rows = table.double()[ids]
    assert torch.allclose(out.double(), (rows * weights.double()[..., None]).sum(1), atol=1e-3)
    expected = torch.zeros(1000, 100, device="cuda", dtype=torch.float64)
    parts = weights.double()[..., None] * dout.double()[:, None]
    expected.index_add_(0, ids.view(-1), parts.view(-1, 100))
    for kind in ("atomics", "locks", "reverse indices"):
        grad, locks = torch.empty_like(table), torch.zeros(1000, device="cuda", dtype=torch.int32)
        triton_backward(kind, table, ids, weights, dout, grad, dweights, locks)
        assert torch.allclose(grad.double(), expected, atol=1e-3), kind
        assert torch.allclose(dweights.double(), (rows * dout.double()[:, None]).sum(2), atol=1e-3)


def bags(width, slots, tokens):
    table = torch.randn(slots, width, device="cuda", dtype=torch.bfloat16)
    weights = torch.randn(tokens, BAG, device="cuda", dtype=torch.bfloat16)
    sets = id_sets(tokens, slots)
    # PyTorch has no weighted sums of packed rows: a user would keep them in bf16.
    nearest = ["bf16", "f16", "int8", "e4m3", "int4"]
    plain = lambda s: F.embedding_bag(sets[s], table, per_sample_weights=weights, mode="sum")
    measured("PyTorch embedding_bag (bf16)", "bag_sum", nearest, "uniform", tokens, width, slots, lambda: plain)
    compiled = torch.compile(lambda ids: (table[ids] * weights[..., None]).sum(1), dynamic=False)
    measured("torch.compile (bf16)", "bag_sum", nearest[:1], "uniform", tokens, width, slots, lambda: lambda s: compiled(sets[s]))
    if triton is not None:
        out = torch.empty(tokens, width, device="cuda", dtype=torch.bfloat16)
        ours = lambda s: triton_sum(table, sets[s], weights, out)
        measured("Triton (bf16)", "bag_sum", nearest, "uniform", tokens, width, slots, lambda: ours)


def backwards(tokens, width, slots, zipf):
    """Forward and backward of a bag with the gradient of its weights; gradients of the rows in a dense table."""
    ids = "zipf" if zipf else "uniform"

    def make(kind):
        table = torch.randn(slots, width, device="cuda", dtype=torch.bfloat16)
        grad, locks = torch.empty_like(table), torch.zeros(slots, device="cuda", dtype=torch.int32)
        weights = torch.randn(tokens, BAG, device="cuda", dtype=torch.bfloat16)
        dout = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
        out, dweights, sets = torch.empty_like(dout), torch.empty_like(weights), id_sets(tokens, slots, zipf)

        def call(s):
            triton_sum(table, sets[s], weights, out)
            triton_backward(kind, table, sets[s], weights, dout, grad, dweights, locks)

        return call

    for kind in ("atomics", "locks", "reverse indices"):
        # Thousands of tokens that wait for one row: minutes.
        if not (zipf and kind == "locks"):
            by = f"Triton, {kind}, dense gradient"
            measured(by, "forward+backward", ["bf16"], ids, tokens, width, slots, lambda: make(kind))


def steps(tokens, width, slots):
    """Forward, backward and optimizer step."""

    def make(kind):
        dtype = torch.float32 if kind == "SparseAdam" else torch.bfloat16
        table = torch.nn.Parameter(torch.randn(slots, width, device="cuda", dtype=dtype))
        sparse = kind == "SparseAdam"
        optimizer = torch.optim.SparseAdam([table], lr=1e-3) if sparse else torch.optim.AdamW([table], lr=1e-3, fused=True)
        weights = torch.randn(tokens, BAG, device="cuda", dtype=dtype)
        dout = torch.randn(tokens, width, device="cuda", dtype=dtype)
        sets = id_sets(tokens, slots)
        if kind == "Triton":
            table.grad, out, dweights = torch.zeros_like(table), torch.empty_like(dout), torch.empty_like(weights)

            def call(s):
                triton_sum(table, sets[s], weights, out)
                triton_backward("reverse indices", table, sets[s], weights, dout, table.grad, dweights, None)
                optimizer.step()

            return call

        def call(s):
            optimizer.zero_grad(set_to_none=True)
            bag = F.embedding_bag(sets[s], table, per_sample_weights=weights, mode="sum", sparse=sparse)
            bag.backward(dout)
            optimizer.step()

        return call

    name = {
        "AdamW": "PyTorch, fused AdamW (no gradient of weights)",
        "SparseAdam": "PyTorch, SparseAdam (f32, the same)",
        "Triton": "Triton, reverse indices, fused AdamW",
    }
    for kind in ("AdamW", "SparseAdam") + (("Triton",) if triton is not None else ()):
        measured(name[kind], "step", ["bf16"], "uniform", tokens, width, slots, lambda: make(kind))


def select(tokens, dtype):
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
    measured("PyTorch einsum and topk", "select", [name], "-", tokens, HALF, SUB_KEYS**2, lambda: call)


def main():
    global REPEATS
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    REPEATS = 8 if args.quick else 24
    wants = lambda *names: any(args.only in name for name in names)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.config.cache_size_limit = 64
    if triton is not None:
        check()
    x = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    y = torch.empty_like(x)
    report(f"PyTorch {torch.__version__}", "copy", ["-"], "-", 0, 0, 0, median_ms(lambda s: y.copy_(x)))
    del x, y
    if wants("select"):
        for tokens in (1, 32, TOKENS, 32768):
            for dtype in (torch.float32, torch.bfloat16):
                select(tokens, dtype)
    if wants("bag_sum"):
        for width in (256, 1024) if args.quick else (64, 100, 256, 1000, 1024, 4096):
            bags(width, 1 << 20, TOKENS)
        bags(1024, 1 << 22, TOKENS)
        for tokens in (1, 32, 32768):
            bags(1024, 1 << 20, tokens)
    if wants("sparse", "step"):
        for width, slots in ((256, 20), (1024, 20), (4096, 20), (1024, 22), (1024, 24)):
            if triton is not None and slots < 24:
                backwards(TOKENS, width, 1 << slots, False)
                backwards(TOKENS, width, 1 << slots, True)
            steps(TOKENS, width, 1 << slots)
        for tokens in () if args.quick else (1, 32, 32768):
            for slots in (20, 24):
                if triton is not None and slots < 24:
                    backwards(tokens, 1024, 1 << slots, False)
                steps(tokens, 1024, 1 << slots)


if __name__ == "__main__":
    main()
