"""Code shared by the searches: resumable studies, Pareto fronts, choices under noise, quality during a search."""
