"Every family and every method: the same answer with or without cache, alone or in a batch, padded left or right, by `generate` or by hand."
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from daco_nb.annotation import Probe
from daco_nb.demo import FAMILIES, drawings, scene, smollm2_folder
from daco_nb.dictionary import Behaviour, ConceptDictionary
from daco_nb.mllm import IMAGE, LAST, TEXT, MLLM
from daco_nb.sae import SAE
from daco_nb.steering import DACO, MOP, ActAdd, Gate, Prompting, steer

D_MODEL, LAYER = 128, 2
NAMES = ("Prompting", "ActAdd", "MOP", "DACO (paper)", "DACO", "L1", "two layers")
TEXTS = ["What is this?", "Tell me about bread. Then tell me more.", "Hi", "Explain how a bridge stands, and why it does not fall.",
         "Which of these do you see: a cat, a dog or a boat?", "Read the words.", "And now?", "Write a story of one sentence."]


def tiny(family, seed=0):
    "A model of a family around four random layers; float64, so that no two tokens come near each other."
    torch.manual_seed(seed)
    tok = AutoTokenizer.from_pretrained(smollm2_folder())
    cfg = LlamaConfig(vocab_size=len(tok), hidden_size=D_MODEL, intermediate_size=192, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
                      tie_word_embeddings=True, initializer_range=.3, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model, processor = FAMILIES[family](LlamaForCausalLM(cfg), tok)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=.3)
    processor.tokenizer.padding_side = "left"
    gen = model.generation_config
    gen.eos_token_id, gen.pad_token_id, gen.bos_token_id, gen.do_sample = 2, 2, 1, False
    return MLLM(model.eval().requires_grad_(False).double(), processor, family)


@pytest.fixture(scope="module", params=FAMILIES)
def mllm(request):
    return tiny(request.param)


def make(mllm):
    "One method of each kind, with random directions that are strong enough to change every answer."
    g = torch.Generator().manual_seed(1)
    V = torch.randn(60, D_MODEL, generator=g)
    D = ConceptDictionary([f"c{i}" for i in range(60)], V, torch.randn(D_MODEL, generator=g), .5 + torch.rand(D_MODEL, generator=g), LAYER, torch.ones(60))
    sae, label = SAE.from_dictionary(D, k=12).eval().requires_grad_(False), torch.arange(60) % 3 - 1
    l1 = SAE.from_dictionary(D, architecture="l1").eval().requires_grad_(False)
    push = Behaviour(LAYER + 1, 9*torch.randn(D_MODEL, generator=g), torch.zeros(D_MODEL))
    gate = Gate(Probe(1, torch.randn(D_MODEL, generator=g), 0.), -1e6)
    return {"Prompting": Prompting(), "ActAdd": ActAdd(15*torch.randn(D_MODEL, generator=g), LAYER), "MOP": MOP(D, label == -1, 12),
            "DACO (paper)": DACO(sae, label, D, 2.), "DACO": DACO(sae, label.clamp(max=0), D, 1.5, gate, push, 3),
            "L1": DACO(l1, label, D, 2., only_active=True), "two layers": DACO(sae, label, D, 2., behaviour=push, span=99)}


@pytest.fixture(scope="module")
def methods(mllm):
    return make(mllm)


def pictures(n):
    return [scene(i, 6, (drawings()[i],)).image if i % 2 == 0 else None for i in range(n)]


def tokens(mllm, n, batch_size=8, **kwargs):
    return mllm.generate(TEXTS[:n], pictures(n), max_new_tokens=6, batch_size=batch_size, **kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_cache_and_batch_make_no_difference(mllm, methods, name):
    free = tokens(mllm, 8)
    with steer(mllm, methods[name]):
        steered = tokens(mllm, 8)
        assert steered == tokens(mllm, 8, use_cache=False) == tokens(mllm, 8, batch_size=1)
    assert sum(a != b for a, b in zip(free, steered)) >= 6
    assert tokens(mllm, 8) == free


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("image", [True, False])
def test_padding_and_company_leave_the_states_alone(mllm, methods, name, image):
    texts, images = TEXTS[:3], pictures(1)*3 if image else [None]*3
    tok, last = mllm.tokenizer, len(mllm.layers) - 1

    def states(side, rows):
        tok.padding_side = side
        try:
            batch = mllm.prepare([texts[i] for i in rows], [images[i] for i in rows])
            hidden = mllm.read(batch, [last])[last]
            return [(r[r > 0], h[r > 0]) for r, h in zip(batch["roles"], hidden)]
        finally:
            tok.padding_side = "left"
    with steer(mllm, methods[name]):
        left, right, alone = states("left", range(3)), states("right", range(3)), [states("left", [i])[0] for i in range(3)]
    for a, b, c in zip(left, right, alone):
        assert torch.equal(a[0], b[0]) and torch.equal(a[0], c[0]) and (IMAGE in a[0]) == image and TEXT in a[0] and a[0][-1] == LAST
        for other in (b[1], c[1]):  # rotary angles are computed in float32, whatever the model
            assert ((a[1] - other).norm(dim=1) / a[1].norm(dim=1)).max() < 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("image", [True, False])
def test_a_loop_by_hand_says_what_generate_says(mllm, methods, name, image):
    with steer(mllm, methods[name]), torch.no_grad():
        batch = mllm.prepare(TEXTS[:1], pictures(1) if image else None)
        with mllm._using(batch) as inputs:
            n = inputs["input_ids"].shape[1]
            auto = mllm.model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, output_logits=True, return_dict_in_generate=True)
            out, said, logits = mllm.model(**inputs, use_cache=True), [], []
            for _ in range(5):
                logits.append(out.logits[:, -1])
                said.append(logits[-1].argmax(-1, keepdim=True))
                out = mllm.model(input_ids=said[-1], past_key_values=out.past_key_values, use_cache=True)
    assert torch.equal(auto.sequences[:, n:], torch.cat(said, 1))
    torch.testing.assert_close(torch.stack(auto.logits), torch.stack(logits).float(), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("name", ("ActAdd", "DACO"))
def test_sampling_with_a_seed_repeats_itself(mllm, methods, name):
    def sample(seed):
        torch.manual_seed(seed)
        with steer(mllm, methods[name]):
            return tokens(mllm, 3, do_sample=True, temperature=5.)
    assert sample(3) == sample(3) != sample(4)


def test_after_the_block_the_model_is_untouched(mllm, methods):
    batch = mllm.prepare(TEXTS, pictures(8))

    def logits():
        with mllm._using(batch) as inputs, torch.no_grad():
            return mllm.model(**inputs).logits
    before, weights = logits(), {k: v.clone() for k, v in mllm.model.state_dict().items()}
    for m in methods.values():
        with steer(mllm, m):
            if m.name != "Prompting":
                assert not torch.equal(logits(), before)
        assert torch.equal(logits(), before)
    assert all(torch.equal(v, weights[k]) for k, v in mllm.model.state_dict().items())


@pytest.mark.parametrize("name", ("ActAdd", "MOP", "DACO"))
def test_two_threads_with_two_models(name):
    models = [tiny(f, seed) for f, seed in (("llava", 5), ("internvl", 6))]

    def run(m):
        with steer(m, make(m)[name]):
            return tokens(m, 4, batch_size=2)
    alone = [run(m) for m in models]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, models)) == alone and alone[0] != alone[1]
