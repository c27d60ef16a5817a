"""From shards on disk to packs on the way to the device.

::

    rows.json + images/ ──shards.make──► shards/train-000000.tar …  + .nv-meta (index, splits)         shards.py
                                                  │
    blend.yaml: which folders, what weights ──recipe.read_recipe──► Sources, all of it checked         recipe.py
                                                  │
            Energon: slice over ranks and workers, shuffle, blend, restore
                                                  ▼
    {"json": bytes, "0.jpg": bytes} ──SampleEncoder.tokenize──► TokenSample (ids, image bytes)         task.py
                                                  │  choose whole conversations for one token budget   packing.py
                                                  ▼
                        SampleEncoder.load_pixels ──► EncodedSample ──collate──► PackedBatch
                                                  │
    each batch leaves the loader with its position; a checkpoint keeps the position of the             loader.py
    last batch that was trained on, of every rank, as plain JSON                                       state.py
                                                  ▼
                       ShardDataModule: endless train loader, finite val loader                        module.py

Beside the stream: `check.check` reads every sample as training would, `preview.inspect` shows packs as the model gets them.

Nothing that comes out of a shard, a recipe or a checkpoint is executed or unpickled: samples stay bytes until our own
parser reads them, and YAML is read here, against an allow-list, never by Energon.
"""
