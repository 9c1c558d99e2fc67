"""The embedded world: generated clips and small trained weights, in the layouts of the real ones."""
