"""Multi-token prediction trained beside the policy, against transformers' layer in float64."""

import itertools

import policies
import pytest
import torch
from safetensors.torch import load_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from r1engine.batch import RowShape, Sequence, pack
from r1engine.config import RlConfig
from r1engine.model.policy import Policy
from r1engine.stages.sft import cross_entropy

ITEMS = [
    Sequence([2 + (7 * i + 5 * j * j) % 90 for j in range(n)], 1, 0.1 + 0.01 * i) for i, n in enumerate((2, 9, 31))
]
EXACT = {"dtype": torch.float64, "experts_implementation": "eager"}  # its fused experts take float32 at most
BEHIND = "model.layers.4."


def rows():
    return pack(ITEMS, RowShape(max_tokens=36))[0]


def policy_of(world, folder, weight: float, **optimizer) -> Policy:
    optimizer = {"eps": 1e-3, "clip_grad": 0.0} | optimizer
    return policies.policy_of(RlConfig(model={"path": folder, "mtp_loss_weight": weight}, optimizer=optimizer), world)


class Oracle(torch.nn.Module):
    """The module of DeepSeek-V3's report, section 2.2, around a decoder layer of transformers; float64."""

    def __init__(self, folder, base) -> None:
        super().__init__()
        config = DeepseekV3Config.from_pretrained(folder)
        config.num_hidden_layers += 1
        whole = DeepseekV3ForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float64, experts_implementation="eager"
        )
        self.layer, self.rotary = whole.model.layers[4], whole.model.rotary_emb
        tensors = load_file(folder / "model.safetensors")
        names = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
        self.own = torch.nn.ParameterDict({n.replace(".", "_"): tensors[f"{BEHIND}{n}.weight"].double() for n in names})
        self.base, self.eps, self.whole = [base], config.rms_norm_eps, [whole]

    def norm(self, x, name):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.own[name], self.eps)

    def forward(self, tokens):
        """Log-probabilities of tokens[2:]."""
        base, x = self.base[0], torch.tensor([tokens])
        with torch.no_grad():
            hidden, embedded = base.model(x).last_hidden_state[:, :-1], base.model.embed_tokens(x)[:, 1:]
        both = torch.cat([self.norm(embedded, "enorm"), self.norm(hidden, "hnorm")], -1)
        hidden = both @ self.own["eh_proj"].T
        n = hidden.shape[1]
        mask = torch.full((1, 1, n, n), -torch.inf, dtype=torch.float64).triu(1)
        place = torch.arange(n)[None]
        hidden = self.layer(
            hidden, attention_mask=mask, position_ids=place, position_embeddings=self.rotary(hidden, place)
        )
        logits = self.norm(hidden, "shared_head_norm") @ base.lm_head.weight.detach().T
        return torch.log_softmax(logits, -1)[0, :-1].gather(1, x[0, 2:, None])[:, 0]


def test_loss_and_update_are_those_of_transformers_layer(world, folders, tmp_path):
    folder, _ = folders["deepseek-mtp"]
    base = DeepseekV3ForCausalLM.from_pretrained(folder, **EXACT)
    oracle = Oracle(folder, base)
    optimizer = torch.optim.AdamW(
        [*oracle.layer.parameters(), *oracle.own.parameters()], lr=1e-2, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0
    )
    policy = policy_of(world, folder, 0.3)
    stats = policy.update(rows(), cross_entropy, 1e-2).metrics
    loss = -sum((item.weight * oracle(item.tokens)).sum() for item in ITEMS)
    (0.3 * loss).backward()
    optimizer.step()
    assert stats["mtp_loss"] == pytest.approx(loss.item(), rel=1e-5)
    policy.export(tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    oracle.whole[0].save_pretrained(tmp_path / "expected")
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    names = [n for n in expected if n.startswith(BEHIND)]
    assert len(names) > 20
    for name in names:
        torch.testing.assert_close(found[name].double(), expected[name], atol=2e-6, rtol=1e-5)
    for name, value in oracle.own.items():
        name = f"{BEHIND}{name.replace('shared_head_', 'shared_head.')}.weight"
        torch.testing.assert_close(found[name].double(), value.detach(), atol=2e-6, rtol=1e-5)


def test_the_policys_update_does_not_depend_on_the_modules(world, folders):
    folder, _ = folders["deepseek-mtp"]
    with_mtp, without = (policy_of(world, folder, weight, clip_grad=0.1) for weight in (0.3, 0.0))
    for _ in range(2):
        a, b = (policy.update(rows(), cross_entropy, 1e-2).metrics for policy in (with_mtp, without))
        assert a.pop("mtp_loss") > 0
        assert a == b
    for (name, found), (_, expected) in zip(with_mtp.weights(), without.weights(), strict=True):
        assert torch.equal(found, expected), name


def test_the_modules_learn_and_are_exported_with_the_new_matrices(world, folders, tmp_path):
    folder, _ = folders["deepseek-mtp"]
    policy = policy_of(world, folder, 0.3)
    losses = [policy.update(rows(), cross_entropy, 1e-2).metrics["mtp_loss"] for _ in range(5)]
    assert all(later < before for before, later in itertools.pairwise(losses))
    policy.export(tmp_path / "out")
    found, before = (load_file(path / "model.safetensors") for path in (tmp_path / "out", folder))
    assert found.keys() == before.keys()
    assert not torch.equal(found[f"{BEHIND}eh_proj.weight"], before[f"{BEHIND}eh_proj.weight"])
    assert torch.equal(found[f"{BEHIND}embed_tokens.weight"], found["model.embed_tokens.weight"])
    assert torch.equal(found[f"{BEHIND}shared_head.head.weight"], found["lm_head.weight"])
    policy_of(world, tmp_path / "out", 0.3).export(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_a_folder_without_modules_is_refused(world, folders):
    with pytest.raises(ValueError, match=r"model.mtp_loss_weight: found 0.3, required 0: .* has no MTP module"):
        policy_of(world, folders["deepseek"][0], 0.3)
