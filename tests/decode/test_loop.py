"""The generation loop, driven by a script instead of a model where only what becomes of the tokens matters."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_ids, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast

from lissom.decode import Answer, NativeDecode, Sampling, generate_text, generate_tokens
from lissom.errors import UserError

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
PROMPT = torch.ones(1, 4, dtype=torch.int64)


def byte_level():
    """A token is a byte, so that an emoji takes four; the last token ends an answer."""
    vocabulary = {letter: number for number, letter in enumerate([*ALPHABET, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def byte_fallback():
    """In the manner of SentencePiece: words begin with a mark, the first one loses it, and rare letters are bytes."""
    pieces = ["<unk>", "<end>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh", "▁ab", "cd"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("c", "d")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")


TOKENIZERS = {"bytes": byte_level(), "fallback": byte_fallback()}


class Script:
    """Stands for a model that says `tokens`, one row of them for each row of the prompt, and then nonsense."""

    def __init__(self, *tokens: list[int], end: int | list[int] | None = None) -> None:
        self.tokens, self.calls = tokens, 0
        self.generation_config = SimpleNamespace(eos_token_id=end)

    def __call__(self, ids, **options):
        logits = torch.zeros(len(ids), 1, 300)
        for row, tokens in enumerate(self.tokens):
            logits[row, 0, tokens[self.calls] if self.calls < len(tokens) else 7] = 1
        self.calls += 1
        return SimpleNamespace(logits=logits)


def said(text, tokenizer="bytes", **options):
    """The pieces in which `text` is yielded, and how it ended."""
    tokenizer, answer = TOKENIZERS[tokenizer], Answer([])
    ids = tokenizer(text, add_special_tokens=False).input_ids
    options = {"max_new_tokens": len(ids), **options}
    script = Script(ids, end=options.pop("end", None))
    pieces = list(generate_text(script, tokenizer, PROMPT, cache=DynamicCache(), answer=answer, **options))
    return pieces, answer


LETTERS = st.text(st.sampled_from("abcd e漢字é🎉👩‍👩‍👧\n"), max_size=30)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@given(text=LETTERS)
@settings(max_examples=60, deadline=None)
def test_letters_of_several_tokens_come_whole(tokenizer, text):
    text = text.strip()  # the other tokenizer takes a space in front for its own
    pieces, answer = said(text, tokenizer)
    assert "".join(pieces) == text and all(pieces) and not any("\N{REPLACEMENT CHARACTER}" in p for p in pieces)
    assert answer.finish == "length" and "".join(pieces) == TOKENIZERS[tokenizer].decode(answer.tokens)
    if tokenizer == "bytes":
        assert [len(piece) for piece in pieces] == [1] * len(text)  # each as soon as its last byte is there


def expected(text, stops):
    """Letter by letter: the answer ends where the first stop string is complete, before it."""
    for end in range(len(text) + 1):
        places = [place for stop in stops if (place := text[:end].find(stop)) >= 0]
        if places:
            return text[: min(places)], "stop"
    return text, "length"


@given(text=LETTERS, stops=st.lists(st.text(st.sampled_from("abcd e漢🎉"), min_size=1, max_size=4), max_size=3))
@settings(max_examples=150, deadline=None)
def test_stop_strings_wherever_tokens_end(text, stops):
    pieces, answer = said(text, stop_strings=stops)
    assert ("".join(pieces), answer.finish) == expected(text, stops)


@pytest.mark.parametrize("text,stops,wanted", [("abcdef", ["de"], "abc"), ("ab cdab", ["bcd", "dab"], "ab c")])
def test_stop_strings_inside_and_across_tokens(text, stops, wanted):
    assert "".join(said(text, "fallback", stop_strings=stops)[0]) == wanted


def test_an_answer_that_ends_within_a_letter():
    pieces, answer = said("a🎉", max_new_tokens=3)
    assert pieces == ["a", "\N{REPLACEMENT CHARACTER}"] and len(answer.tokens) == 3


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="stop string is empty"):
        said("a", stop_strings=["b", ""])


@pytest.mark.parametrize("most,calls", [(0, 0), (1, 1), (3, 3)])
def test_the_number_of_tokens(most, calls):
    script = Script(list(range(10)))
    tokens = [int(token) for token in generate_tokens(script, PROMPT, cache=DynamicCache(), max_new_tokens=most)]
    assert tokens == list(range(most)) and script.calls == calls


@pytest.mark.parametrize("end", [256, [3, 256]])
def test_the_end_token_is_not_part_of_the_text(end):
    pieces, answer = said("abc<end>abc", end=end)
    assert "".join(pieces) == "abc" and answer.finish == "stop" and answer.tokens[-1] == 256 and len(answer.tokens) == 4


def test_rows_that_are_finished_say_nothing_more():
    script = Script([5, 9, 5, 5, 5], [5, 5, 5, 9, 5], end=9)
    tokens = generate_tokens(script, PROMPT.repeat(2, 1), cache=DynamicCache(), max_new_tokens=9)
    assert torch.stack(list(tokens), 1).tolist() == [[5, 9, -1, -1], [5, 5, 5, 9]]


@pytest.mark.parametrize("ids", [PROMPT[:, :0], PROMPT[0], torch.empty(0, 3, dtype=torch.int64)], ids=str)
def test_an_empty_prompt_is_refused(ids):
    with NativeDecode()(model := tiny_model("llama")), pytest.raises(UserError, match="nothing to read"):
        next(generate_tokens(model, ids))


def test_a_prompt_that_the_cache_has_read_is_refused():
    model, ids = tiny_model("llama"), random_ids(6)
    with torch.no_grad(), NativeDecode()(model):
        cache = model(ids, use_cache=True).past_key_values
        with pytest.raises(UserError, match="has 6 tokens, the cache has read 6"):
            next(generate_tokens(model, ids, cache=cache))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(repetition_penalty=1.3)], ids=str)
def test_ties_are_broken_as_transformers_does(sampling):
    """All logits are the same."""
    model, ids = tiny_model("llama"), random_ids(5, rows=2)
    torch.nn.init.zeros_(model.lm_head.weight)
    options = {"do_sample": False, "max_new_tokens": 4, "repetition_penalty": sampling.repetition_penalty}
    wanted = model.generate(ids, **options)[:, 5:]
    with NativeDecode()(model):
        tokens = generate_tokens(model, ids, max_new_tokens=4, sampling=sampling, stop=[])
        assert torch.stack(list(tokens), 1).equal(wanted)
        assert model.generate(ids, **options)[:, 5:].equal(wanted)


@pytest.mark.parametrize("padded", [False, True])
def test_tokens_are_those_of_generate(padded):
    model, ids = tiny_model("qwen3"), random_ids(12, rows=3)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :5] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "repetition_penalty": 1.2, "attention_mask": mask}
    wanted = model.generate(ids, **options)[:, 12:]
    sampling = Sampling(repetition_penalty=1.2)
    with NativeDecode(kv="fp32")(model):
        tokens = generate_tokens(
            model, ids, max_new_tokens=12, sampling=sampling, mask=mask if padded else None, stop=[]
        )
        assert torch.stack(list(tokens), 1).equal(wanted)


def test_seeds():
    model, ids = tiny_model("llama"), random_ids(8)

    def draw(seed):
        sampling = Sampling(temperature=1.5, top_k=50, top_p=0.95, min_p=0.001, repetition_penalty=1.1, seed=seed)
        return [int(token) for token in generate_tokens(model, ids, max_new_tokens=20, sampling=sampling, stop=[])]

    with NativeDecode()(model):
        state = torch.random.get_rng_state()
        first = draw(1)
        torch.manual_seed(99)  # the generator is the loop's own
        assert draw(1) == first != draw(2)
        torch.random.set_rng_state(state)


def test_logits_that_are_no_numbers_are_one_sentence():
    model = tiny_model("llama")
    model.model.norm.weight.data[3] = torch.nan
    for sampling in (Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=5, min_p=0.1)):
        with pytest.raises(UserError, match="logits are NaN"):
            next(generate_tokens(model, random_ids(4), sampling=sampling))
