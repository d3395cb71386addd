"""From raw shards to a registered encoder: the path of a batch.

    shards.py      bytes -> records -> documents, or a reason why not
    manifest.py    shards -> blocks with hashes and counts; the fingerprint and the ledger
    plan.py        (manifest, seed) -> an endless sequence of work orders
    text.py        documents -> sentences -> tokens -> pairs -> masked rows -> arrays
    batches.py     work orders -> Ray Data -> slots of global batches, in one order for any W
    feed.py        each start of the Ray Train workers begins at the newest commit
    training.py    slots -> loss -> one summed gradient -> step; the only loop
    checkpoint.py  the commit log: what was trained, and where to go on
    tracking.py    metrics -> spool -> MLflow, without waiting and without loss
    evaluate.py    held-out documents -> figures beside what they have to beat
    registry.py    bundle -> registered model -> `load_encoder`

`pretrain.py` runs these stages, `verify.py` makes the batches anew and compares, and `cli.py`
is the command. Raw data and everything random are addressed, so all of it can be repeated.
"""
