"""The tokenizers of the mini world load like released ones and know its words."""

import pytest

from vireo.mini import captioned_clips, scenes, tokenizers

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tokenizers.write_clip_tokenizer(folder)
    return transformers.CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    tokenizers.write_t5_tokenizer(folder)
    return transformers.T5Tokenizer.from_pretrained(folder)


def test_words_are_exactly_those_of_the_texts():
    used = {word for seed in range(400) for word in scenes.scene(seed).text.split()}
    assert used == set(tokenizers.words())


@pytest.mark.parametrize("seed", range(12))
def test_each_word_of_the_world_is_one_token(clip, t5, seed):
    text = scenes.scene(seed).text
    assert clip.tokenize(text) == [f"{word}</w>" for word in text.split()]
    assert t5.tokenize(text) == [f"▁{word}" for word in text.split()]


def test_clip_pads_to_77_and_ends_with_its_own_tokens(clip):
    ids = clip("drop the red square", padding="max_length", truncation=True).input_ids
    assert len(ids) == clip.model_max_length == 77
    assert ids[0] == clip.bos_token_id
    assert ids[5:] == [clip.eos_token_id] * 72
    assert max(ids) < len(clip)
    assert len(clip("red " * 100, truncation=True).input_ids) == 77


def test_t5_ends_with_eos_and_pads_with_zero(t5):
    ids = t5("drop the red square", padding="max_length").input_ids
    assert len(ids) == t5.model_max_length == 226
    assert ids[4] == t5.eos_token_id == 1
    assert ids[5:] == [0] * 221


@pytest.mark.parametrize("text", ["move the blue circle to the left", "a strange zebra, 42 of them!"])
def test_any_text_comes_back(clip, t5, text):
    assert clip.decode(clip(text).input_ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
    assert t5.decode(t5(text).input_ids, skip_special_tokens=True) == text


def test_unknown_characters_do_not_fail(clip, t5):
    assert clip.unk_token_id not in clip("žluťoučký 猫", add_special_tokens=False).input_ids
    assert t5.unk_token_id in t5("猫").input_ids


def test_saved_tokenizers_read_back_equal(clip, t5, tmp_path):
    text = "cover the white circle with the black triangle, please"
    for name, tokenizer in (("clip", clip), ("t5", t5)):
        tokenizer.save_pretrained(tmp_path / name)
        again = type(tokenizer).from_pretrained(tmp_path / name)
        assert again(text).input_ids == tokenizer(text).input_ids


def test_t5_loads_as_the_class_its_config_names(t5):
    again = transformers.AutoTokenizer.from_pretrained(t5.name_or_path)
    assert type(again) is transformers.T5TokenizerFast
    assert again("drop the red square").input_ids == t5("drop the red square").input_ids


def test_clip_text_model_pools_at_the_end_token(clip):
    """What a text encoder built for this tokenizer must be told; with CLIP's default numbers it would be wrong."""
    torch = pytest.importorskip("torch")
    config = transformers.CLIPTextConfig(
        vocab_size=len(clip), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        projection_dim=8, bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id,
    )  # fmt: skip
    ids = torch.tensor([clip("drop the red square", padding="max_length").input_ids])
    with torch.no_grad():
        output = transformers.CLIPTextModel(config).eval()(ids)
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 5])


def test_words_of_other_captions_are_tokens_where_they_are_asked_for(tmp_path):
    caption = captioned_clips.meanings()[0][0].caption
    tokenizers.write_t5_tokenizer(tmp_path, captioned_clips.words())
    tokenizer = transformers.T5Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize(caption) == [f"▁{word}" for word in caption.split()]
    assert tokenizer.tokenize(scenes.scene(3).text) == [f"▁{word}" for word in scenes.scene(3).text.split()]
