"""Reading images of any storage format: npz, npy, image files, shards, tars, live generators."""
