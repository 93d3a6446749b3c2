"""Serving: requests share one model, token by token.

The host's side imports neither jax nor numpy:

- `request`: what is asked, what the device answers, what the caller hears
- `plan`: the limits, and a plan, one launch of the device
- `pages`: the pool of cache pages
- `prefix`: names for full pages, shared by requests that begin alike
- `sequence`: a request on its way
- `batch`: the shapes of a plan
- `scheduler`: who runs next, on which pages
- `counters`: numbers under vLLM's names
- `simulate`: the scheduler against a model of a step's cost
"""
