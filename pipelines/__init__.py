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
    training/workers.py     workers followed from the driver, and why they failed
    training/tracking.py    metrics -> spool -> MLflow, without waiting and without loss
    use/heldout.py          what is measured on, without copies of what was trained on
    use/evaluate.py         held-out documents -> figures beside what they have to beat
    use/evaluate_images.py  held-out pictures -> the loss, and whether the encoder collapsed
    use/evaluate_labels.py  labels told from frozen features, beside what they have to beat
    use/commit_figures.py   commits -> held-out figures, while the training goes on
    use/predictions.py      held-out masked tokens -> a table of what is told of them
    use/pictures.py         held-out pictures -> sheets of rows and reconstructions, a map; sheet.py
    use/embed.py            documents or pictures -> Parquet files with ids, each written once
    use/duplicates.py       embeddings -> pairs that are alike, groups, a sheet of the pictures
    use/nearest.py          embeddings and a query -> the nearest; neighbours.py searches for both
    use/finetune.py         encoder and labels -> a registered classifier; labelled.py, fit.py
    use/label_table.py      whether pretraining pays where labels are few
    use/registry.py         bundle -> registered model -> `load_encoder` -> use/encoder.py
    use/compare_models.py   candidate and champion -> scores on the same held-out items
    use/compare_labels.py   and how well labels are told from their features
    use/promotion.py        scores -> intervals (comparison.py) -> `champion` moves, or stays
    use/hf_export.py        encoder -> a folder that transformers loads; hf_layout.py: back

`pretrain.py` runs these stages, `use/preview.py` and `use/preview_images.py` show rows before any
of them is trained on, `use/verify.py` makes the batches anew and compares, and `cli.py`
is the command. Raw data and everything random are addressed, so all of it can be repeated.
"""

VERSION = "0.1.0"
