"""Sampling: solvers, the Sampler from weights to images, and `fastdit sample`."""
