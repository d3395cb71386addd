"""From raw shards to a registered encoder: the path of a batch.

    data/shards.py          bytes -> records -> documents, or a reason why not
    data/manifest.py        shards -> blocks with hashes and counts; the fingerprint and the ledger
    data/vocabulary.py      text -> ids, given pieces; vocabulary_training.py learns the pieces
    data/plan.py            (manifest, seed) -> an endless sequence of work orders
    data/text.py            documents -> sentences -> tokens -> pairs -> masked rows -> arrays
    data/batches.py         work orders -> Ray Data -> slots of global batches, one order for any W
    training/feed.py        each start of the Ray Train workers begins at the newest commit
    training/loop.py        slots -> loss -> one summed gradient -> step; the only loop
    training/checkpoint.py  the commit log: what was trained, and where to go on
    training/tracking.py    metrics -> spool -> MLflow, without waiting and without loss
    use/evaluate.py         held-out documents -> figures beside what they have to beat
    use/registry.py         bundle -> registered model -> `load_encoder`

`pretrain.py` runs these stages, `use/verify.py` makes the batches anew and compares, and `cli.py`
is the command. Raw data and everything random are addressed, so all of it can be repeated.
"""
