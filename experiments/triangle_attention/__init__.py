"""Triangle attention (AlphaFold) in cosine form: the module, a task that needs it, fused against plain."""
