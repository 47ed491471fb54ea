"""Programs that put load on a work queue and write down what they asked and what they were told."""
