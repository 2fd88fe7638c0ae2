"""The operations of PyTorch and FBGEMM that a user would pick instead, timed on request.

The bench starts this program once and talks to it over its input and output, a line of JSON each way:
{"prepare": CASE} builds tables and rotating inputs and answers {"ready": true} or {"unsupported": WHY};
{"run": N} makes N calls with the next inputs and answers {"us": MICROSECONDS A CALL};
{"versions": true} answers what is installed.
Only public functions of the libraries are called; shapes and names are those of the bench.
"""

import gc
import json
import sys
import time

import torch

try:
    import fbgemm_gpu  # noqa: F401
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
except Exception as problem:  # without FBGEMM its rows are missing, and the table says so
    fbgemm_gpu, FBGEMM_PROBLEM = None, str(problem).splitlines()[0]

# Rotating inputs touch this many bytes of rows, more than the last cache has, but not more sets than this.
ROTATE_BYTES, ROTATE_SETS = 1 << 30, 16 << 10

tables = {}


def table(key, make):
    """The table of the last case, if this one has the same."""
    if key not in tables:
        tables.clear()
        gc.collect()
        tables[key] = make()
    return tables[key]


def uniform(*shape):
    return torch.empty(*shape).uniform_(-1, 1)


class Case:
    """Sizes of a case, and its rotating inputs."""

    def __init__(self, sizes):
        self.__dict__.update(sizes)
        self.bag = self.heads * self.top_k
        bytes_a_call = self.t * self.bag * self.row_bytes
        self.sets = max(1, min(ROTATE_SETS, -(-ROTATE_BYTES // max(1, bytes_a_call))))
        self.turn = 0

    def ids(self, dtype=torch.int64):
        """Per set [T, L]; Zipf with exponent 1 over scattered slots, by inversion."""
        made = []
        for _ in range(self.sets):
            if self.zipf:
                u = torch.rand(self.t, self.bag, dtype=torch.float64)
                rank = torch.exp(u * torch.log(torch.tensor(float(self.slots)))).long() - 1
                ids = (rank * 0x9E3779B1) % self.slots
            else:
                ids = torch.randint(self.slots, (self.t, self.bag))
            made.append(ids.to(dtype))
        return made

    def weights(self):
        return torch.softmax(uniform(self.t, self.heads, self.top_k), -1).reshape(self.t, self.bag)

    def next(self):
        self.turn = (self.turn + 1) % self.sets
        return self.turn


def select(case):
    keys = uniform(case.heads, 2, case.sub_keys, case.half_dim)
    queries = [uniform(case.t, case.heads, 2, case.half_dim) for _ in range(min(case.sets, 16))]
    return lambda: lookup(queries[case.next() % len(queries)], keys, case.top_k)


def lookup(queries, keys, top_k):
    """Product-key lookup by einsum and topk."""
    t, heads, _, _ = queries.shape
    n = keys.shape[2]
    scores = torch.einsum("thpc,hpnc->thpn", queries, keys)
    best, at = scores.topk(top_k, dim=-1)
    sums = (best[:, :, 0, :, None] + best[:, :, 1, None, :]).view(t, heads, -1)
    ids = (at[:, :, 0, :, None] * n + at[:, :, 1, None, :]).view(t, heads, -1)
    scores, best = sums.topk(top_k, dim=-1)
    return ids.gather(-1, best), torch.softmax(scores, -1)


def bag_sum(case):
    weights = case.weights()
    if case.format in ("f32", "bf16"):
        dtype = torch.float32 if case.format == "f32" else torch.bfloat16
        rows = table((case.format, case.slots, case.v), lambda: uniform(case.slots, case.v).to(dtype))
        ids, weights = case.ids(), weights.to(dtype)
        return lambda: torch.nn.functional.embedding_bag(ids[case.next()], rows, per_sample_weights=weights, mode="sum")
    if case.format in ("int8", "int4"):
        # PyTorch's operation is FBGEMM's kernel; its table-batched front end was ten times slower on the same rows.
        bits = 8 if case.format == "int8" else 4
        pack = torch.ops.quantized.embedding_bag_byte_prepack if bits == 8 else torch.ops.quantized.embedding_bag_4bit_prepack
        rows = table((case.format, case.slots, case.v), lambda: pack(uniform(case.slots, case.v)))
        call = getattr(torch.ops.quantized, f"embedding_bag_{'byte' if bits == 8 else '4bit'}_rowwise_offsets")
        ids = [i.reshape(-1) for i in case.ids(torch.int32)]
        offsets = torch.arange(0, case.t * case.bag, case.bag, dtype=torch.int32)
        flat = weights.reshape(-1)
        return lambda: call(rows, ids[case.next()], offsets, per_sample_weights=flat)
    if case.format == "e4m3":
        if fbgemm_gpu is None:
            raise NotImplementedError(f"no FBGEMM: {FBGEMM_PROBLEM}")
        return fbgemm(case, SparseType.FP8, weights)
    raise NotImplementedError(f"no bag of {case.format} rows")


def fbgemm(case, kind, weights):
    """FBGEMM's table-batched bag for inference."""

    def make():
        options = {}
        if kind == SparseType.FP8:
            options = {"fp8_exponent_bits": 4, "fp8_exponent_bias": 7}
        bags = IntNBitTableBatchedEmbeddingBagsCodegen(
            [("", case.slots, case.v, kind, EmbeddingLocation.HOST)], device="cpu", output_dtype=SparseType.FP32, **options
        )
        bags.fill_random_weights()
        return bags

    bags = table((kind, case.slots, case.v), make)
    ids = [i.reshape(-1) for i in case.ids(torch.int32)]
    offsets = torch.arange(0, case.t * case.bag + 1, case.bag, dtype=torch.int32)
    flat = weights.reshape(-1)
    return lambda: bags.forward(ids[case.next()], offsets, flat)


class MemoryPlus(torch.nn.Module):
    """Query projection, lookup, embedding bag, SiLU gate, value projection (the paper's section 3.2)."""

    def __init__(self, case, sparse):
        super().__init__()
        d = case.v
        self.query = torch.nn.Linear(d, case.heads * 2 * case.half_dim)
        self.keys = torch.nn.Parameter(uniform(case.heads, 2, case.sub_keys, case.half_dim))
        self.values = torch.nn.EmbeddingBag(case.slots, case.v, mode="sum", sparse=sparse)
        self.gate, self.out = torch.nn.Linear(d, case.v), torch.nn.Linear(case.v, d)
        self.case = case

    def forward(self, x):
        case = self.case
        q = self.query(x).view(case.t, case.heads, 2, case.half_dim)
        ids, weights = lookup(q, self.keys, case.top_k)
        y = self.values(ids.view(case.t, -1), per_sample_weights=weights.view(case.t, -1))
        return self.out(y * torch.nn.functional.silu(self.gate(x)))


def layer(case):
    model = table(("layer", case.slots, case.v, case.t), lambda: MemoryPlus(case, False))
    inputs = [uniform(case.t, case.v) for _ in range(16)]

    def call():
        with torch.no_grad():
            return model(inputs[case.next() % 16])

    return call


def step(case):
    """Forward, backward and update; `format` says which optimizer the peer uses."""
    sparse = case.peer == "SparseAdam"
    model = MemoryPlus(case, sparse)
    rest = [p for n, p in model.named_parameters() if not n.startswith("values")]
    dense = torch.optim.AdamW(rest, fused=True)
    values = list(model.values.parameters())
    rows = torch.optim.SparseAdam(values) if sparse else torch.optim.AdamW(values, fused=True)
    inputs = [uniform(case.t, case.v) for _ in range(4)]

    def call():
        loss = model(inputs[case.next() % 4]).square().mean()
        loss.backward()
        dense.step()
        rows.step()
        dense.zero_grad(set_to_none=True)
        rows.zero_grad(set_to_none=True)

    return call


OPERATIONS = {"select": select, "bag_sum": bag_sum, "layer": layer, "step": step}


def answer(request, state):
    if "versions" in request:
        return {"torch": torch.__version__, "fbgemm": getattr(fbgemm_gpu, "__version__", None)}
    if "prepare" in request:
        state.clear()
        gc.collect()
        case = Case(request["prepare"])
        torch.set_num_threads(case.threads)
        try:
            state["call"] = OPERATIONS[case.op](case)
            state["call"]()
        except (NotImplementedError, RuntimeError, KeyError) as problem:
            return {"unsupported": str(problem).splitlines()[0]}
        return {"ready": True}
    call = state["call"]
    start = time.perf_counter()
    for _ in range(request["run"]):
        call()
    return {"us": (time.perf_counter() - start) * 1e6 / request["run"]}


def main():
    state = {}
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), state)), flush=True)


if __name__ == "__main__":
    main()
