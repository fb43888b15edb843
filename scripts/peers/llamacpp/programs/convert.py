"""llama.cpp's own converter: convert.py SOURCE PRE_TOKENIZER, then the converter's words.

It names the pre-tokenizer by a hash of what the tokenizer makes of a test text, and refuses tokenizers that are not in
its list, as those of random and demo checkpoints cannot be: the name is given instead. Nothing else is changed.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    source, pre_tokenizer, *words = sys.argv[1:]
    sys.path[0] = source
    sys.argv = ["convert_hf_to_gguf.py", *words]
    import convert_hf_to_gguf  # type: ignore[import-not-found]
    from conversion.base import TextModel  # type: ignore[import-not-found]

    TextModel.get_vocab_base_pre = lambda *_: pre_tokenizer
    convert_hf_to_gguf.main()
