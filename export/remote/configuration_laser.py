"""Configuration of a decoder or BERT with LASER attention (arXiv 2411.03493), for transformers."""

from transformers import PretrainedConfig


class LaserConfig(PretrainedConfig):
    """`laser_model` is the section `model` of the run's config, with `attention` in it."""

    model_type = "laser_attention"

    def __init__(self, laser_model=None, max_position_embeddings=1024, **kwargs):
        self.laser_model = laser_model or {}
        self.max_position_embeddings = max_position_embeddings
        self.vocab_size = self.laser_model.get("vocab_size", 0)
        self.hidden_size = self.laser_model.get("model_dim", 0)
        self.num_hidden_layers = self.laser_model.get("num_layers", 0)
        self.num_attention_heads = self.laser_model.get("num_heads", 0)
        self.num_key_value_heads = (
            self.laser_model.get("num_kv_heads", 0) or self.num_attention_heads
        )
        kwargs["tie_word_embeddings"] = False  # one matrix serves both ends; nothing to tie
        super().__init__(**kwargs)
