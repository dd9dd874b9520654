"""A word tokenizer for ProsQA and small model definitions around it, for training from scratch without a download.

`python preprocessing/word_tokenizer.py` writes configs/gpt2_small, llama_small and gpt2_124m, one token per word,
configs/llama_quick, one token per phrase, and configs/gpt2_symbolic and llama_symbolic, one token per symbol, which
`AutoConfig.from_pretrained(DIR)` and `AutoTokenizer.from_pretrained(DIR)` load.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from preprocessing.common import prepare_directory
from preprocessing.prosqa import CONCEPTS, NAMES
from preprocessing.prosqa_symbolic import EDGE, NODES, OPTIONS, ROOT
from systems.arguments import Parser
from systems.writing import write_text
from utils import entry_point

EXAMPLES = ("", "--out my_configs")

UNK, EOS = "<unk>", "<eos>"
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what Metaspace writes for the space before a word
PUNCTUATION = (".", "?")  # stand right after a word, so without the space
FIXED_WORDS = ("\n", "###", *"0123456789", "Every", "is", "a", "Is", "or")
POSITIONS = 1024
SETTINGS = {
    "unk_token": UNK,
    "eos_token": EOS,
    "pad_token": EOS,
    "model_max_length": POSITIONS,
    "clean_up_tokenization_spaces": False,
}

COMMON = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1, "tie_word_embeddings": True}
# No dropout: the latent passes of one question would each draw another mask.
GPT2 = COMMON | {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_layer": 4,
    "n_embd": 128,
    "n_head": 4,
    "n_positions": POSITIONS,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
LLAMA = COMMON | {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": POSITIONS,
    "rope_theta": 10000.0,
}
QUICK = LLAMA | {
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "rope_theta": 100.0,  # questions are 20 tokens long
    "initializer_range": 0.08,
}
# Two layers, eight heads, width 768 (arXiv 2505.12514, section on the experiments).
SYMBOLIC = GPT2 | {"n_layer": 2, "n_embd": 768, "n_head": 8}
# The size of GPT-2's blocks; with one token per word the embeddings are small.
WORD_MODELS = {"gpt2_small": GPT2, "llama_small": LLAMA, "gpt2_124m": GPT2 | {"n_layer": 12, "n_embd": 768, "n_head": 12}}
PHRASE_MODELS = {"llama_quick": QUICK}
SYMBOL_MODELS = {"gpt2_symbolic": SYMBOLIC, "llama_symbolic": QUICK | {"num_attention_heads": 4, "num_key_value_heads": 4}}

# The phrases of ProsQA text, each with the concept in it; what is left are single words.
PHRASES = ("Every {}", "is a {}.", "a {}", "or {}?")
PHRASE_PATTERN = r"Every \w+|is a \w+\.|a \w+|or \w+\?|\n|[^\s]+"


def build_word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token per word, the same one wherever the word stands; newline, `###`, `.` and `?` are tokens as well.

    Every line's first word gets the space that the others have, and the decoder takes it away again. So text whose
    words are separated by one space or newline decodes to itself, and parts that end in a newline can be encoded one
    by one. No token is added at the start or end; <eos> also pads; unknown words become <unk>.
    """
    pieces = [
        pre_tokenizers.Split("\n", "isolated"),
        pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always"),
        pre_tokenizers.Split(Regex("[.?]"), "isolated"),
    ]
    return wrap_tokenizer([*PUNCTUATION, *(SPACE + word for word in dict.fromkeys([*FIXED_WORDS, *words]))], pieces)


def wrap_tokenizer(tokens: Iterable[str], pieces: list[Any], decoded: Sequence[Any] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer over the pieces that the pre-tokenizers make. tokens: in the order of their ids, after <unk> and <eos>."""
    vocabulary = {token: index for index, token in enumerate([UNK, EOS, *tokens])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    unspace = [
        decoders.Replace(Regex(" ?\n ?"), "\n"),
        decoders.Replace(Regex(r"(?<=\|>) "), ""),  # after a marker such as <|end-latent|>
    ]
    # Not decoders.Metaspace: it drops every space of the first token, those inside a phrase too.
    spaces = [decoders.Replace(SPACE, " "), decoders.Fuse(), decoders.Replace(Regex("^ "), "")]
    tokenizer.decoder = decoders.Sequence([*spaces, *unspace, *decoded])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SETTINGS)


def build_phrase_tokenizer(names: Iterable[str], concepts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token per phrase of a ProsQA text: "Every lempus", "is a lempus.", "a lempus", "or lempus?"; names alone.

    Sequences are less than half as long as with words, and to look an edge up is to find the token that followed the same
    token before, which small models learn soon. Text decodes to itself as with `build_word_tokenizer`.
    """
    words = ["\n", "###", "Is", *names, *(phrase.format(concept) for phrase in PHRASES for concept in concepts)]
    pieces = [
        pre_tokenizers.Split(Regex(PHRASE_PATTERN), "isolated"),
        pre_tokenizers.Split(Regex("^ +$"), "removed"),
        pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=False),
    ]
    return wrap_tokenizer((SPACE + word.replace(" ", SPACE) for word in words), pieces)


def build_symbol_tokenizer() -> PreTrainedTokenizerFast:
    """One token per symbol of the symbolic ProsQA; with the three markers that training adds they are 40.

    37 stand here: <unk>, <eos>, newline (never written), `###`, <e>, <q>, <r>, 30 nodes. A line break makes no token, so that a
    step is one token, as in arXiv 2505.12514, and each is predicted at the one before; decoding puts the breaks in again,
    before steps and `###`.
    """
    tokens = [SPACE + symbol for symbol in ("\n", "###", EDGE, OPTIONS, ROOT, *NODES)]
    pieces = [
        pre_tokenizers.Split(Regex(r"\s+"), "removed"),
        pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always"),
    ]
    step_or_answer = Regex(r"(?<=\d) (?=n\d+( n|$| #)|###)")
    return wrap_tokenizer(tokens, pieces, [decoders.Replace(step_or_answer, "\n")])


def write_model_directory(directory: Path, model: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    """config.json, tokenizer.json and tokenizer_config.json. UserError: they cannot be written."""
    prepare_directory(directory)
    # By hand: the class name that transformers 5 saves is unknown to transformers 4.
    named = {"tokenizer_class": "PreTrainedTokenizerFast", **SETTINGS, "model_input_names": ["input_ids", "attention_mask"]}
    files = {
        "config.json": json.dumps(model | {"vocab_size": len(tokenizer)}, indent=2),
        "tokenizer.json": tokenizer.backend_tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(named, indent=2),
    }
    for name, text in files.items():
        write_text(directory / name, text + "\n")


@entry_point
def main(given: list[str]) -> None:
    parser = Parser("python preprocessing/word_tokenizer.py", __doc__, EXAMPLES)
    parser.add_argument("--out", type=Path, default=Path("configs"), help="directory (default configs)")
    out = parser.parse_args(given).out
    tokenizers = [
        (WORD_MODELS, build_word_tokenizer([*NAMES, *CONCEPTS])),
        (PHRASE_MODELS, build_phrase_tokenizer(NAMES, CONCEPTS)),
        (SYMBOL_MODELS, build_symbol_tokenizer()),
    ]
    for models_of_one, tokenizer in tokenizers:
        for name, model in models_of_one.items():
            write_model_directory(out / name, model, tokenizer)


if __name__ == "__main__":
    main()
