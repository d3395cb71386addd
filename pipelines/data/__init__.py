"""Raw shards to global batches, a pure function of (data, seed, recipe).

shards, manifest, plan, then text (sentences, vocabulary) or images (decode, views) makes rows, and
batches deals them out.
"""
