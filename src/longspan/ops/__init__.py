"""Pure tensor functions that know documents: one plain reference each, faster backends beside it."""
