"""Parts of language models: plain torch, no Lightning, importing nothing above this folder."""
