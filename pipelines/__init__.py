"""From raw shards to a registered encoder: the path of a batch.

    data/filesystems.py     names -> files, local or of any store that pyarrow knows
    data/shards.py          bytes -> records -> documents or pictures, or a reason why not; tar.py
    data/indexing.py        shards -> blocks with hashes and counts, and the ledger
    data/manifest.py        what that pass has found; the fingerprint
    data/gate.py            whether so much that is broken may be used
    data/vocabulary.py      text -> ids, given pieces; vocabulary_training.py learns the pieces
    data/plan.py            (manifest, seed) -> an endless sequence of work orders
    data/text.py            documents -> sentences -> tokens -> pairs -> masked rows -> arrays
    data/images.py          pictures -> pixels -> views -> rows -> arrays; decode.py, views.py
    data/batches.py         work orders -> Ray Data -> slots of global batches, one order for any W
    training/feed.py        each start of the Ray Train workers begins at the newest commit
    training/loop.py        slots -> loss -> one summed gradient -> step; the only loop
    training/checkpoint.py  the commit log: what was trained, and where to go on
    training/tracking.py    metrics -> spool -> MLflow, without waiting and without loss
    use/evaluate.py         held-out documents -> figures beside what they have to beat
    use/evaluate_images.py  held-out pictures -> the loss, and whether the encoder collapsed
    use/evaluate_labels.py  labels told from frozen features, beside what they have to beat
    use/watch.py            commits -> held-out figures, while the training goes on
    use/embed.py            documents -> Parquet files with ids, each written once
    use/registry.py         bundle -> registered model -> `load_encoder` -> use/encoder.py
    use/hf_export.py        encoder -> a folder that transformers loads; hf_layout.py: back

`pretrain.py` runs these stages, `use/preview.py` shows rows before any of them is trained on,
`use/verify.py` makes the batches anew and compares, and `cli.py`
is the command. Raw data and everything random are addressed, so all of it can be repeated.
"""
