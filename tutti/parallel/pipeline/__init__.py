"""Pipeline parallelism: stages, schedules and what runs them."""
