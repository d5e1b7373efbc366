"""Speed of the fused operations against every form that plain torch offers."""
