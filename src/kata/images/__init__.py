"""Image store, references, layouts, archives, registries, conversion.

Import `kata.images.resolve` on the hot path; everything else is imported on demand.
"""
