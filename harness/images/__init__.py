"""Reading images from any storage format: npz, npy, image files, shards, tars, live generators."""
