"Bad input to the model, and hooks that always come off."
import pytest
import torch
from PIL import Image
from transformers import DynamicCache

from daco_nb.mllm import MLLM, _cached, as_picture
from daco_nb.steering import ActAdd, steer


@pytest.fixture(scope="module")
def mllm():
    return MLLM.demo()


def test_unknown_name():
    with pytest.raises(ValueError, match="no-such-model.*no such folder"):
        MLLM.from_pretrained("./no-such-model")


@pytest.mark.parametrize("layer", [-1, 30, "6"])
def test_layer_out_of_range(mllm, layer):
    with pytest.raises(ValueError, match="0 to 29"):
        mllm.read(mllm.prepare(["hello"]), [layer])


@pytest.mark.parametrize("texts, images", [([], None), ([" "], None), (["a", "b"], [None])])
def test_bad_prompts(mllm, texts, images):
    with pytest.raises(ValueError):
        mllm.prepare(texts, images)


def test_bad_pictures(tmp_path):
    (tmp_path / "x.png").write_bytes(b"not a picture")
    for bad in (tmp_path / "x.png", tmp_path / "missing.png", 3):
        with pytest.raises(ValueError, match="picture"):
            as_picture(bad)
    with pytest.raises(ValueError, match="at most"):
        as_picture(Image.new("1", (20_000, 20_000)))


def test_exception_in_block_leaves_model_unsteered(mllm):
    batch = mllm.prepare(["What is the capital of France?"])
    before = mllm.read(batch, [20])[20]
    hooks = [len(layer._forward_hooks) for layer in mllm.layers], len(mllm.model._forward_pre_hooks)
    with pytest.raises(KeyError):
        with steer(mllm, ActAdd(torch.ones(mllm.d_model), 5)):
            assert not torch.equal(mllm.read(batch, [20])[20], before)
            raise KeyError
    assert torch.equal(mllm.read(batch, [20])[20], before)
    assert ([len(layer._forward_hooks) for layer in mllm.layers], len(mllm.model._forward_pre_hooks)) == hooks


def test_other_width(mllm):
    with pytest.raises(ValueError, match="width 7"):
        with steer(mllm, ActAdd(torch.ones(7), 5)):
            pass


def test_every_generated_token_is_steered(mllm):
    seen = []

    def count(hidden, where):
        seen.append(hidden.shape[1])
        return hidden

    for use_cache in (True, False):
        seen.clear()
        with mllm.intervene({4: count}):
            mllm.generate(["Count to ten."], max_new_tokens=6, min_new_tokens=6, use_cache=use_cache)
        assert len(seen) == 6 and (seen[1:] == [1] * 5 if use_cache else seen[-1] == seen[0] + 5)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_cache_under_either_name(name):
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 5, 2), torch.zeros(1, 1, 5, 2), 0)
    assert _cached({name: cache}) == 5
    assert _cached({name: None, "input_ids": torch.ones(1, 5), "attention_mask": torch.ones(1, 5)}) == 0


def test_tokens_of_unknown_position(mllm):
    with mllm.intervene({4: lambda hidden, where: hidden}), pytest.raises(RuntimeError, match="1 tokens .* mask of 9"):
        mllm.model(input_ids=torch.tensor([[1]]), attention_mask=torch.ones(1, 9, dtype=torch.long))
