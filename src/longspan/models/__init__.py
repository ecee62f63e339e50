"""From a layer pattern to a language model: mixers, block, model, state and budget."""
