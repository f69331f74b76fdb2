"""Text in, batches out. This package knows nothing about models.

sources/         where documents come from      formats.py      what a row holds
corpus.py        which documents are held out   tokenizer.py    load a tokenizer, or train one
preparation.py   documents -> token store       token_store.py  reading it, and its ledger
order.py         (seed, step) -> block ids -> micro-batches -> a process's share
loader.py        block ids -> tensors
"""
