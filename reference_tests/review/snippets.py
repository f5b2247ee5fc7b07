"""For each rule of `kata review`: code that it should mind, and code like it that is fine.

Declared before the rules were measured; test_review.py makes the table.
"""

SNIPPETS = {
    "log-of-softmax": (
        [
            "def loss(z):\n    return -torch.log(torch.softmax(z, dim=1))[:, 0]",
            "def loss(z):\n    p = z.sigmoid()\n    return -p.log()",
            "def loss(z):\n    probs = F.softmax(z, -1)\n    return -torch.log(probs).mean()",
        ],
        ["def f(z):\n    return -F.log_softmax(z, dim=1)[:, 0]", "def dcg(r):\n    return r.log()"],
    ),
    "loss-on-probabilities": (
        ["F.binary_cross_entropy(z.sigmoid(), y)", "criterion = nn.BCELoss()"],
        ["F.binary_cross_entropy_with_logits(z, y)", "nn.BCEWithLogitsLoss()"],
    ),
    "norm-without-eps": (
        ["x / x.norm(dim=1, keepdim=True)", "x / torch.linalg.vector_norm(x)"],
        ["x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)", "F.normalize(x, dim=1)"],
    ),
    "nan-hidden": (
        ["loss = torch.nan_to_num(loss)", "def f(loss):\n    return loss.nan_to_num(0.0)"],
        ["scores = scores.nan_to_num(nan=-torch.inf)"],
    ),
    "softmax-without-dim": (
        ["F.softmax(z)", "torch.log_softmax(z)", "z.softmax()"],
        ["F.softmax(z, dim=-1)", "z.softmax(1)", "torch.softmax(z, 0)", "F.softmax(z, **options)"],
    ),
    "python-hash": (
        ["bucket = hash(key) % n", "def f(keys):\n    return [hash(str(k)) % 7 for k in keys]"],
        [
            "bucket = zlib.crc32(key.encode()) % n",
            "class K:\n    def __hash__(self):\n        return hash(self.name)",
            "hash((seed, epoch))",
        ],
    ),
    "ids-as-floats": (
        ["item_ids.float()", "ids.to(torch.float32)", "def f(user_id):\n    user_id.float()"],
        ["labels.float()", "ids.to(torch.int64)", "ids.to(device)"],
    ),
    "one-hot-product": (
        [
            "F.one_hot(ids, n).float() @ table",
            "rows = F.one_hot(ids).to(w.dtype) @ w",
            "def f(ids):\n    picks = F.one_hot(ids, n).float()\n    return picks @ table",
        ],
        ["F.embedding(ids, table)", "x @ table", "hit = F.one_hot(y, n)\nloss = (hit * z).sum()"],
    ),
    "max-norm": (
        ["F.embedding(ids, w, max_norm=1.0)", "nn.Embedding(10, 4, max_norm=1)"],
        ["F.embedding(ids, w, padding_idx=0)"],
    ),
    "hidden-modules": (
        [
            "class M(nn.Module):\n    def __init__(self):\n        self.layers = [nn.Linear(2, 2)]",
            "class M:\n    def __init__(self, n):\n"
            "        self.towers = {k: nn.Linear(2, 2) for k in n}",
            "class B(nn.Module):\n    pass\n\nclass M:\n    def __init__(self):\n"
            "        self.blocks = [B() for _ in range(2)]",
        ],
        [
            "class M:\n    def __init__(self):\n"
            "        self.layers = nn.ModuleList([nn.Linear(2, 2)])",
            "class M:\n    def __init__(self):\n        self.sizes = [1, 2]",
        ],
    ),
    "dropout-without-mode": (
        ["F.dropout(x, 0.5)", "F.dropout(x, p=self.p)"],
        ["F.dropout(x, 0.5, self.training)", "F.dropout(x, 0.1, training=self.training)"],
    ),
    "mode-not-restored": (
        [
            "def check(model, x):\n    model.eval()\n    with torch.no_grad():\n        model(x)",
            "class M:\n    def forward(self, x):\n        self.eval()\n        return self.net(x)",
        ],
        [
            "def validate(model, x):\n    was = model.training\n    model.eval()\n    try:\n"
            "        return model(x).detach()\n    finally:\n        model.train(was)",
            "def load():\n    model = make()\n    model.eval()\n    return model",
        ],
    ),
    "input-changed": (
        [
            "def f(x: Tensor) -> Tensor:\n    x += 1\n    return x",
            "def f(x: Tensor):\n    x[x < 0] = 0\n    return x",
            "def f(scores: torch.Tensor, seen):\n    scores.masked_fill_(seen, -1)",
        ],
        [
            "def f(x: Tensor):\n    x = x.clone()\n    x += 1\n    return x",
            "def f(n: int):\n    n += 1\n    return n",
            "def fill_(x: Tensor):\n    x.zero_()",
        ],
    ),
    "assert-as-check": (
        ["def f(x):\n    assert x.dim() == 2\n    return x"],
        ["def f(x):\n    if x.dim() != 2:\n        raise ValueError(x.shape)"],
    ),
    "global-seed": (
        ["def init(self):\n    torch.manual_seed(0)\n    return torch.randn(3)"],
        ["def run(seed):\n    torch.manual_seed(seed)", "torch.Generator().manual_seed(0)"],
    ),
    "wait-in-step": (
        [
            "for b in data:\n    loss = f(b)\n    loss.backward()\n    opt.step()\n"
            "    total += loss.item()",
            "for b in data:\n    loss = f(b)\n    loss.backward()\n    opt.step()\n    print(loss)",
            "class M:\n    def forward(self, x):\n        return x * x.max().item()",
            "def train_step(m, b):\n    return m(b).cpu()",
        ],
        [
            "for b in data:\n    loss = f(b)\n    loss.backward()\n    opt.step()\n"
            "    if log:\n        print(loss.item())",
            "def evaluate(m, b):\n    return m(b).cpu()",
        ],
    ),
    "made-on-the-cpu": (
        [
            "def f(x: Tensor):\n    return x + torch.arange(len(x))",
            "class M:\n    def forward(self, x: Tensor):\n        return torch.zeros(3) + x",
        ],
        [
            "def f(x: Tensor):\n    return x + torch.arange(len(x), device=x.device)",
            "def f(x: Tensor):\n    return x + torch.eye(3).to(x)",
            "def f(n: int):\n    return torch.arange(n)",
        ],
    ),
    "loop-over-rows": (
        [
            "def f(x: Tensor):\n    return sum(g(x[i]) for i in y) or [0]\n\n"
            "def h(x: Tensor):\n    out = []\n    for i in range(len(x)):\n"
            "        out.append(x[i].sum())\n    return out",
            "def f(x: Tensor):\n    for row in x:\n        g(row)",
            "def f(x: torch.Tensor):\n    for i in range(x.shape[0]):\n        y = x[i, 0]",
            "def f(x: Tensor):\n    return [g(x[i : i + 1]) for i in range(len(x))]",
            "def f(ends, x):\n    for a, b in ends.tolist():\n        F.embedding(x[a:b], w)",
        ],
        [
            "def f(layers):\n    for layer in layers:\n        x = layer(x)",
            "def f(x: Tensor, n: int):\n    for i in range(n):\n        x = x + i",
            "def f(ids):\n    return [names[i] for i in ids.tolist()]",
        ],
    ),
    "sample-loader": (["loader = DataLoader(data, batch_size=3)"], ["x[torch.randperm(len(x))]"]),
    "sort-for-top-k": (
        ["top = scores.argsort(descending=True)[:, :10]", "np.argsort(-s)[:k]"],
        ["scores.topk(10)", "np.argsort(-s, kind='stable')[:k]", "scores.argsort()[:, 1:]"],
    ),
    "compiled-in-loop": (
        [
            "for x in data:\n    torch.compile(model)(x)",
            "class M:\n    def forward(self, x):\n        return torch.compile(self.net)(x)",
        ],
        [
            "model = torch.compile(model)",
            "torch.compiler.reset()\nfor x in data:\n    torch.compile(f, backend=count)(x)",
        ],
    ),
    "gradients-not-cleared": (
        ["for b in data:\n    f(b).backward()\n    opt.step()"],
        [
            "for b in data:\n    opt.zero_grad()\n    f(b).backward()\n    opt.step()",
            "for b in data:\n    f(b).backward()",
        ],
    ),
    "graph-kept": (
        ["for b in data:\n    loss = f(b)\n    loss.backward()\n    total += loss"],
        ["for b in data:\n    loss = f(b)\n    loss.backward()\n    total += loss.detach()"],
    ),
    "unsafe-load": (
        ["torch.load(path, weights_only=False)", "pickle.load(file)"],
        ["torch.load(path, weights_only=True)", "json.load(file)", "torch.load(path)"],
    ),
    "graph-in-evaluation": (
        ["def evaluate(model, x):\n    model.eval()\n    return model(x)"],
        [
            "def evaluate(model, x):\n    model.eval()\n    with torch.no_grad():\n"
            "        return model(x)",
            "@torch.inference_mode()\ndef score(model, x):\n    model.eval()\n    return model(x)",
        ],
    ),
    "blocking-in-async": (
        ["async def answer():\n    time.sleep(0.1)", "async def a():\n    requests.get(url)"],
        ["async def answer():\n    await asyncio.sleep(0)", "def a():\n    time.sleep(1)"],
    ),
    "batching-timer": (
        ["async def loop():\n    while True:\n        await asyncio.sleep(0.002)\n        drain()"],
        [
            "async def loop():\n    while True:\n        await asyncio.sleep(0)",
            "async def loop():\n    while True:\n        first = await queue.get()",
            "async def stop():\n    while busy():\n        await asyncio.sleep(0.01)",
        ],
    ),
    "timed-without-synchronising": (
        [
            "def bench(fn: Callable[[], object]):\n    t = time.perf_counter()\n    fn()\n"
            "    return time.perf_counter() - t"
        ],
        [
            "def bench(fn: Callable[[], object]):\n    t = time.perf_counter()\n    fn()\n"
            "    torch.cuda.synchronize()\n    return time.perf_counter() - t",
            "def request():\n    t = time.time()\n    answer()\n    return time.time() - t",
        ],
    ),
}
