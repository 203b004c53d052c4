"""A server loop over real and simulated engines: traffic, step times, service-level objectives."""
