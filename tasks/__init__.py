"""The stages of a fine-tune, each in a room of its own, over shared contracts and one artefact store."""
