"""What a worker does: factories and live agents, intake, dispatch, interventions."""
