"""Decoding by diffusion language models in the plainest way: fp32, one prompt, keys and values in lists."""

import torch

from eightfold import reference


class PlainModel:
    """The decoder's weights in a transformer of its own. `block` > 0: a row sees no later block of so many."""

    def __init__(self, decoder, block=0):
        self.config, self.block = decoder.config, block
        self.weights = {name: p.detach().float() for name, p in decoder.named_parameters()}
        self.head = decoder.lm_head.weight.detach().float()
        self.frequency = decoder._frequency

    def run(self, ids, begin, cache):
        """Hidden rows of `ids` at the places from `begin` on. `cache`, a list of (key, value) for each place in each
        layer, gets theirs; they see all that is in it then."""
        c, w = self.config, self.weights
        places = torch.arange(begin, begin + len(ids))
        x = w["model.embed_tokens.weight"][torch.tensor(ids)]
        for layer in range(c.num_hidden_layers):
            name = f"model.layers.{layer}."
            y = self.norm(x, name + "input_layernorm")
            q, k, v = (self.linear(y, f"{name}self_attn.{n}_proj").unflatten(-1, (-1, c.head_dim)) for n in "qkv")
            q, k = self.turn(q, places), self.turn(k, places)
            kept = cache[layer]
            kept += [None] * (begin + len(ids) - len(kept))
            kept[begin : begin + len(ids)] = zip(k, v, strict=True)
            keys, values = (torch.stack(part, dim=1) for part in zip(*kept, strict=True))
            shared = c.num_attention_heads // c.num_key_value_heads
            keys, values = keys.repeat_interleave(shared, dim=0), values.repeat_interleave(shared, dim=0)
            scores = q.transpose(0, 1) @ keys.mT * c.head_dim**-0.5
            if self.block:
                later = torch.arange(len(kept)) // self.block > places[:, None] // self.block
                scores = scores.masked_fill(later, -torch.inf)
            mixed = (scores.softmax(-1) @ values).transpose(0, 1).flatten(1)
            x = x + self.linear(mixed, name + "self_attn.o_proj")
            y = self.norm(x, name + "post_attention_layernorm")
            gate, up = self.linear(y, name + "mlp.gate_proj"), self.linear(y, name + "mlp.up_proj")
            x = x + self.linear(torch.nn.functional.silu(gate) * up, name + "mlp.down_proj")
        return self.norm(x, "model.norm")

    def empty(self):
        return [[] for _ in range(self.config.num_hidden_layers)]

    def linear(self, x, name):
        y = x @ self.weights[name + ".weight"].T
        return y + self.weights[name + ".bias"] if name + ".bias" in self.weights else y

    def norm(self, x, name):
        return (
            x * (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).rsqrt() * self.weights[name + ".weight"]
        )

    def turn(self, x, places):
        angle = places[:, None, None] * self.frequency
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)


class PlainLoop:
    """One prompt and its canvas. `steps`, `factor` or `threshold` is the rule; `compat` the published loops' quirks."""

    def __init__(self, decoder, mask, *, shifted=False, compat=False, threshold=None, factor=None, steps=None, **rest):
        self.decoder, self.mask, self.shifted, self.compat = decoder, mask, shifted, compat
        self.threshold, self.factor, self.steps = threshold, factor, steps
        self.every = rest.pop("refresh_every", 1)
        self.temperature, self.seed = rest.pop("temperature", 0.0), rest.pop("seed", 0)
        self.stops, self.forbidden = rest.pop("stops", ()), rest.pop("forbidden", [mask])
        assert not rest
        self.forwards, self.ended, self.history = 0, False, []

    # ---- what a pass predicts, and which of it stays ----

    def predict(self, rows, places):
        """Tokens and confidences from hidden rows."""
        logits = rows @ self.model.head.T
        logits[:, self.forbidden] = -torch.inf
        n = len(places)
        options = torch.full((n,), self.temperature), torch.zeros(n, dtype=torch.int32), torch.ones(n)
        ids = reference.sample(logits, torch.full((n,), self.seed), torch.tensor(places), *options)
        confidence = logits.double().softmax(-1).gather(1, ids[:, None])[:, 0]
        return ids.tolist(), confidence.tolist()

    def uncover(self, rows, begin, end):
        """rows: what the tokens of the window from `begin` to `end` are predicted from."""
        ids, confidence = self.predict(rows, range(begin, end))
        masks = [i for i in range(begin, end) if self.x[i] == self.mask]
        order = sorted(masks, key=lambda i: -confidence[i - begin])
        if self.steps is not None:
            base, more = divmod(self.found, self.steps)
            count = base + (self.turn < more)
            self.turn += 1
        else:
            count = 0
            for n, i in enumerate(order, 1):
                least = self.threshold if self.factor is None else 1 - self.factor / (n + 1)
                if n > 1 and confidence[i - begin] < least:
                    break
                count = n
            if self.compat and self.factor is not None and count == len(order) - 1:
                count += 1
        for i in order[: max(1, count)]:
            self.x[i] = ids[i - begin]
        self.history.append((begin, [confidence[i - begin] for i in order]))
        for i in range(begin, end):
            if self.x[i] == self.mask:
                break
            self.ended |= self.x[i] in self.stops and i >= self.prompt

    def enter(self, begin, end):
        self.found, self.turn = self.masks(begin, end), 0

    def masks(self, begin, end):
        return self.x[begin:end].count(self.mask)

    # ---- models that see all of the canvas ----

    def run(self, prompt, canvas, block, cache):
        self.model = PlainModel(self.decoder)
        self.x, self.prompt = [*prompt, *[self.mask] * canvas], len(prompt)
        for number, begin in enumerate(range(len(prompt), len(self.x), block)):
            self.enter(begin, begin + block)
            self.stale = number % self.every
            self.block(begin, begin + block, cache)
            if self.ended:
                break
        return self.x[len(prompt) :], self.forwards

    def block(self, begin, end, cache):
        self.forwards += 1
        if self.stale:
            kept, place = self.kept, 2 * begin - end
            hidden = self.model.run(self.x[place:end], place, kept)
        else:
            kept, place = self.model.empty(), 0
            hidden = self.model.run(self.x, 0, kept)
        self.kept, before = kept, hidden[begin - 1 - place : begin - place]
        if self.shifted and self.compat:
            self.x[begin] = self.predict(before, [begin])[0][0]
        else:
            self.uncover(self.rows(hidden, place, begin, end, before), begin, end)
        owed = self.compat and cache != "none"
        while owed or (self.masks(begin, end) and not self.ended):
            owed = False
            self.forwards += 1
            if cache == "none":
                hidden = self.model.run(self.x, 0, self.model.empty())
                rows = self.rows(hidden, 0, begin, end, hidden[begin - 1 : begin])
            else:
                last = end if cache == "dual" else len(self.x)
                rows = self.rows(self.model.run(self.x[begin:last], begin, kept), begin, begin, end, before)
            if self.masks(begin, end):
                self.uncover(rows, begin, end)

    def rows(self, hidden, place, begin, end, before):
        """What the tokens from `begin` to `end` are predicted from; hidden[0] is the row at `place`."""
        if not self.shifted:
            return hidden[begin - place : end - place]
        if begin > place:
            return hidden[begin - place - 1 : end - place - 1]
        return torch.cat([before, hidden[: end - begin - 1]])

    # ---- block-causal models ----

    def run_causal(self, prompt, canvas, block, window, cache):
        """Keys of the text before a block are computed anew from its tokens in every pass: no cache but that of
        "dual" within the block."""
        self.model = PlainModel(self.decoder, block)
        self.x, self.prompt = list(prompt), len(prompt)
        while len(self.x) < len(prompt) + canvas and not self.ended:
            begin = len(self.x) // block * block
            self.x += [self.mask] * (begin + block - len(self.x))
            self.forwards += begin > len(prompt)  # the block before had its keys fixed
            for at in range(begin, begin + block, window):
                self.window(at, at + window, cache)
                if self.ended:
                    break
        missing = len(prompt) + canvas - len(self.x)
        return [*self.x[len(prompt) :], *[self.mask] * missing][:canvas], self.forwards

    def window(self, at, end, cache):
        if not self.masks(at, end):
            return
        self.enter(at, end)
        kept = self.model.empty()
        hidden = self.model.run(self.x, 0, kept)
        before = hidden[max(0, at - 1)][None]
        while True:
            self.forwards += 1
            self.uncover(self.rows(hidden, 0 if len(hidden) > end - at else at, at, end, before), at, end)
            if self.ended or not self.masks(at, end):
                return
            if cache == "dual":
                hidden = self.model.run(self.x[at:end], at, kept)
            else:
                hidden = self.model.run(self.x, 0, self.model.empty())
