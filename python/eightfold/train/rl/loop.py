"""GRPO: rollout, rewards, advantages, update; one function, ``train_rl(config)``, in one process or many under torchrun
(arXiv 2402.03300; Jet-RL, arXiv 2601.14243).

Modes, by ``model.precision`` and ``rollout.precision``: bf16 and same; bf16 and fp8, whose rollout is another policy
than the one trained; fp8 and same, the unified flow, in which the log-probabilities of rollout and training have the
same bits.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eightfold.generate.console import stop_ids
from eightfold.generate.requests import Completion, Request, RolloutOptions
from eightfold.generate.rollout import Rollout
from eightfold.generate.text import SamplingOptions
from eightfold.models import Decoder
from eightfold.train import checkpoint, distributed
from eightfold.train.distributed import World
from eightfold.train.interrupt import Interrupted, StopRequests
from eightfold.train.loop import load_model, make_optimizer, sum_in_products
from eightfold.train.report import RunLog, memory_bytes, read_log
from eightfold.train.rl.advantages import group_advantages, overlong_penalties
from eightfold.train.rl.batches import PackedSamples, Sample, pack, parts
from eightfold.train.rl.config import RlConfig
from eightfold.train.rl.meters import SampleMeters, TokenMeters
from eightfold.train.rl.objective import loss_denominator, policy_loss
from eightfold.train.rl.remote import RemoteRollout
from eightfold.train.rl.report import plot_rewards
from eightfold.train.rl.rewards import Verdict, VerifierPool, VerifierSource
from eightfold.train.rl.sharing import PolicyCopy, agreeing, dealt_out, export_policy, own_part, same_passes
from eightfold.train.rl.tasks import PromptItem, Prompts, load_task
from eightfold.train.run import learning_rate


@dataclass
class RlResult:
    """Each step's record, as in log.jsonl, and where the last checkpoint is."""

    records: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: Path | None = None


def train_rl(config: RlConfig, model: Decoder | None = None, tokenizer: Any = None, name: str = "") -> RlResult:
    """Runs ``config``; a ``model`` and its tokenizer may be given instead of loading ``config.model.path``.

    Raises ValueError or OSError with one line for what a user can mend, Interrupted after Ctrl-C or SIGTERM.
    """
    with distributed.start(config.device) as world:
        torch.manual_seed(config.seed)
        if model is None:
            model, tokenizer = load_model(config.model, world.device)
        source = VerifierSource.of(config.reward, config.task)
        with VerifierPool(source, config.reward) as verifiers:
            return _Run(config, model, tokenizer, world, verifiers, name).run()


class _Run:
    def __init__(self, config, model, tokenizer, world: World, verifiers: VerifierPool, name: str) -> None:
        self.config, self.model, self.tokenizer, self.world = config, model, tokenizer, world
        self.verifiers = verifiers
        if config.prompts_per_step % world.size:
            raise ValueError(f"prompts_per_step={config.prompts_per_step} cannot be shared by {world.size} processes")
        task = load_task(config.task, config.seed, config.reward.function is None)
        self.prompts = Prompts(task, tokenizer, config.prompt, config.seed)
        self.reference = None
        if config.objective.kl_coefficient:
            self.reference = copy.deepcopy(model).requires_grad_(False).eval()
            distributed.shard(self.reference, world)
        distributed.shard(model, world)
        sum_in_products(model, world)
        self.optimizer = make_optimizer(model, config.optimizer, config.model.precision)
        self.policy_copy, self.served_step, self.kept = None, None, None
        self.rollout = self._make_rollout()
        self.stop_ids = frozenset(stop_ids(model.config.eos_token_id, tokenizer.eos_token_id))
        self.step = 0
        self.result = RlResult()
        if config.resume:
            self._resume(checkpoint.find(config.output, config.resume))
        elif checkpoint.complete(config.output):
            raise ValueError(f"{config.output}: already holds checkpoints; go on with resume=latest, or choose another")
        self.log = RunLog(
            config.output, config.steps, self.step, tensorboard=config.tensorboard, quiet=not world.leads, name=name
        )

    def _make_rollout(self) -> Rollout | RemoteRollout:
        model, rollout = self.model, self.config.rollout
        if rollout.engine is not None:
            return RemoteRollout(rollout.engine, model.config.vocab_size, self.tokenizer)
        pages = -(-rollout.cache_tokens // rollout.page_size)
        options = RolloutOptions(pages, rollout.page_size, rollout.sequences, keep_cache=rollout.keep_cache)
        precision = model.precision if rollout.precision == "same" else rollout.precision
        if self.world.size > 1:
            self.policy_copy = PolicyCopy(model, precision)
            model = self.policy_copy.decoder
        elif precision != model.precision:
            model = model.in_precision(precision)
        engine = Rollout(model, options, self.tokenizer)
        if model is self.model and model.precision == "fp8":  # training reads the bytes that rollout reads
            self.kept, model.compute.codes = engine.kept, engine.kept.codes
        return engine

    def run(self) -> RlResult:
        config = self.config
        try:
            with StopRequests(self.world) as stop:
                while self.step < config.steps:
                    self._one_step()
                    last, stopping = self.step == config.steps, stop.agreed()
                    every = config.checkpoint_every
                    if (last or stopping) and self.world.leads:
                        plot_rewards(Path(config.output) / "rewards.png", {self._mode(): read_log(self.log.path)})
                    if stopping or (last and config.checkpoint_at_end) or (every and self.step % every == 0):
                        self._save()
                    if stopping and not last:
                        raise Interrupted(f"interrupted after step {self.step}; go on with resume=latest")
        finally:
            self.log.close()
        return self.result

    def _mode(self) -> str:
        training, rollout = self.config.model.precision, self.config.rollout
        if rollout.engine is not None:
            corrected = {"truncate": "TIS", "mask": "masked IS"}[self.config.objective.correction.kind]
            return f"{training} training, rollout by another engine, {corrected}"
        return f"{training} training, {training if rollout.precision == 'same' else rollout.precision} rollout"

    def _hand_over(self) -> None:
        """Gives the policy of this step to what does the rollout and does not share its parameters."""
        if self.policy_copy is not None:
            self.policy_copy.receive()
        reload = self.config.rollout.engine and self.config.rollout.engine.reload
        if not reload or (self.served_step is not None and self.step - self.served_step < reload.every):
            return
        folder = Path(reload.folder or Path(self.config.output) / "engine")
        export_policy(self.model, folder, self.tokenizer, reload.format, self.world)
        with agreeing(self.world):
            if self.world.leads:
                self.rollout.reload(folder)
        self.served_step = self.step

    def _one_step(self) -> None:
        config, world, begin = self.config, self.world, time.perf_counter()
        # Every process walks through all prompts, so that their place is one wherever a run goes on.
        items = own_part(self.prompts.take(config.prompts_per_step), world)
        self._hand_over()
        with agreeing(world):
            groups = self._roll_out(items)
            rolled = time.perf_counter()
            verdicts = self.verifiers.collect()
        completions = [completion for group in groups for completion in group]
        owners = [item for item, group in zip(items, groups, strict=True) for _ in group]
        failures = sum(verdict.failure is not None for verdict in verdicts)
        rewards = torch.tensor([verdict.reward for verdict in verdicts], dtype=torch.float64)
        lengths = torch.tensor([len(completion.tokens) for completion in completions])
        penalties = overlong_penalties(lengths, config.max_new_tokens, config.overlong) if config.overlong else None
        numbers = torch.arange(len(items)).repeat_interleave(config.samples_per_prompt)
        advantages = group_advantages(rewards, numbers, config.advantage, penalties)
        everything = [
            Sample(item.ids, completion, config.rollout.temperature, advantage)
            for item, completion, advantage in zip(owners, completions, advantages.values.tolist(), strict=True)
        ]
        samples = [sample for sample, kept in zip(everything, advantages.kept.tolist(), strict=True) if kept]
        judged = time.perf_counter()
        losses, tokens, norm, rate = self._update(samples, everything[0])
        ended = time.perf_counter()
        self.step += 1
        truncated = torch.tensor([completion.finish == "length" for completion in completions])
        watched = SampleMeters.of(rewards, lengths, truncated, advantages, failures).over(world)
        trained = world.sum([float(sum(sample.tokens for sample in samples))])[0]
        # The slowest process is the one that the others wait for.
        spans = world.gather((rolled - begin, ended - judged, ended - begin))
        rollout_seconds, training_seconds, seconds = (max(each) for each in zip(*spans, strict=True))
        record = {
            "step": self.step,
            "loss": sum(losses) / max(1, len(losses)),
            **watched.means(),
            **tokens.over(world).means(),
            "lr": rate,
            "grad_norm": norm,
            "rollout_tokens_per_second": watched.length / rollout_seconds,
            "training_tokens_per_second": trained / training_seconds,
            "tokens_per_second": watched.length / seconds,
            "memory_bytes": memory_bytes(self.world.device),
        }
        if config.rollout.engine is not None:  # steps that the engine's weights were behind
            record["engine_age"] = self.step - 1 - (self.served_step or 0)
        if not all(math.isfinite(loss) for loss in losses):
            self._fail(record, owners, completions, verdicts)
        first_failures = [failure for failure in world.gather(self.verifiers.first_failure) if failure]
        if watched.verifier_failures and first_failures:
            self.log.say(first_failures[0])
        self.result.records.append(record)
        self.log.write(record)

    def _roll_out(self, items: list[PromptItem]) -> list[list[Completion]]:
        """Completions of each prompt; each is handed to the verifiers in the order of prompts when all are drawn."""
        config = self.config
        options = SamplingOptions(config.rollout.temperature, config.rollout.top_k, config.rollout.top_p)
        first = self.world.rank * len(items)  # a prompt's place in the whole step, which its seed depends on
        requests = [
            Request(
                item.ids,
                config.max_new_tokens,
                options,
                seed=(config.seed * 1_000_003 + self.step) * 1_000_003 + number,
                samples=config.samples_per_prompt,
                stop_ids=self.stop_ids,
                stop=tuple(config.rollout.stop),
            )
            for number, item in enumerate(items, first)
        ]
        groups = self.rollout.generate(requests)
        for item, group in zip(items, groups, strict=True):
            for completion in group:
                self.verifiers.submit(item.item, self._text(completion), completion.finish)
        return groups

    def _text(self, completion: Completion) -> str:
        text = self.tokenizer.decode(completion.tokens, skip_special_tokens=True)
        for stop in self.config.rollout.stop:
            text = text.partition(stop)[0]
        return text

    def _update(self, samples: list[Sample], spare: Sample) -> tuple[list[float], TokenMeters, float, float]:
        """Optimizer steps on shares of the samples: their losses over all processes, this one's meters, the last
        gradient norm and rate. ``spare``: computed, without counting, where other processes have more to compute."""
        config, world, losses, meters, norm = self.config, self.world, [], TokenMeters(), 0.0
        rate = learning_rate(config.optimizer, self.step, config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        shares = [
            [pack(part, world.device) for part in parts(share, config.micro_batch_tokens)]
            for share in dealt_out(samples, config.updates_per_step, world)
        ]
        denominators = world.sum(
            [sum(loss_denominator(packed.batch, config.objective) for packed in share) for share in shares]
        )
        shares = same_passes(shares, spare, world.device, world)
        if config.updates_per_step > 1:  # before the first update changes the policy that they are compared with
            shares = [[self._with_old(packed) for packed in share] for share in shares]
        for share, denominator in zip(shares, denominators, strict=True):
            total = torch.zeros((), device=world.device)
            for packed in share:
                batch = self._with_reference(packed)
                loss, found = policy_loss(packed.log_probs(self.model), batch, config.objective, denominator)
                (loss * world.size).backward()  # FSDP averages gradients over the processes
                total += loss.detach()
                meters = meters + found
            if share:
                norm = self._optimize()
                losses += world.sum([total.item()])
        return losses, meters, norm, rate

    def _with_old(self, packed: PackedSamples) -> PackedSamples:
        with torch.no_grad():
            old = packed.log_probs(self.model)
        return dataclasses.replace(packed, batch=dataclasses.replace(packed.batch, old_logp=old))

    def _with_reference(self, packed: PackedSamples):
        if self.reference is None:
            return packed.batch
        with torch.no_grad():
            return dataclasses.replace(packed.batch, reference_logp=packed.log_probs(self.reference))

    def _optimize(self) -> float:
        if hasattr(self.optimizer, "grad_norm"):  # eightfold's scales gradients as it reads them
            self.optimizer.step()
            norm = self.optimizer.grad_norm
        else:
            limit = self.config.optimizer.max_grad_norm or math.inf
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.kept is not None:  # not every optimizer counts its writes
            self.kept.refresh()
        return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()

    def _fail(self, record: dict, owners: list[PromptItem], completions: list[Completion], verdicts: list[Verdict]):
        path = Path(self.config.output) / f"failed-step-{self.step}.json"
        samples = [
            {"prompt": item.text, "text": self._text(completion), **vars(completion), **vars(verdict)}
            for item, completion, verdict in zip(owners, completions, verdicts, strict=True)
        ]
        samples = [sample for part in self.world.gather(samples) for sample in part]
        if self.world.leads:
            path.write_text(json.dumps({"record": record, "samples": samples}, indent=1) + "\n")
        raise ValueError(f"step {self.step}: the loss is {record['loss']}; the step's samples are in {path}")

    def _save(self) -> None:
        state = {"prompts": self.prompts.state_dict(), "config": self.config.model_dump(mode="json")}
        self.result.checkpoint = checkpoint.save(
            self.config.output,
            self.step,
            self.model,
            self.optimizer,
            state,
            self.world,
            tokenizer=self.tokenizer,
            keep_last=self.config.keep_last,
        )

    def _resume(self, folder: Path) -> None:
        state = checkpoint.read_state(folder)
        if state["step"] >= self.config.steps:
            raise ValueError(f"{folder}: is at step {state['step']}; raise steps ({self.config.steps}) to go on")
        try:
            self.prompts.load_state_dict(state["prompts"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{folder}: no checkpoint of this RL run: {error}") from None
        checkpoint.load(folder, self.model, self.optimizer, self.world)
        self.step = state["step"]
