"""The paper's model, in reading order: encoder, position, flow, scoring, torch_model; folded is its fast form."""
