"""Text in, batches out; knows nothing of models.

corpus.py     documents, and their split into train and validation
tokenizer.py  load a tokenizer, or train one on the training documents
store.py      documents -> token store on disk + ledger, prepared once and then memory-mapped
order.py      (seed, step) -> block ids -> micro-batches -> this process's share
loader.py     block ids -> tensors
"""
