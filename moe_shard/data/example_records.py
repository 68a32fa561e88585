"""Read tf.train.Example records without TensorFlow: what TFDS and MaxText keep in ArrayRecords."""

from __future__ import annotations

import functools
from typing import Any

from moe_shard.data.formats import needed


@functools.cache
def _example_class() -> Any:
    """Declare the messages of tensorflow/core/example/{example,feature}.proto."""
    pb2 = needed("google.protobuf.descriptor_pb2", "a tf.train.Example")
    pool = needed("google.protobuf.descriptor_pool", "a tf.train.Example").DescriptorPool()
    factory = needed("google.protobuf.message_factory", "a tf.train.Example")
    field = pb2.FieldDescriptorProto
    file = pb2.FileDescriptorProto(name="moe_shard_example.proto", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, str]) -> Any:
        made = file.message_type.add(name=name)
        for field_name, number, kind in fields:
            one = made.field.add(name=field_name, number=number, label=field.LABEL_OPTIONAL)
            if kind == "bytes":
                one.type, one.label = field.TYPE_BYTES, field.LABEL_REPEATED
            else:
                one.type, one.type_name = field.TYPE_MESSAGE, f".{kind}"
        return made

    message("BytesList", ("value", 1, "bytes"))
    message("Feature", ("bytes_list", 1, "BytesList"))
    features = message("Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    entry.field.add(
        name="value", number=2, type=field.TYPE_MESSAGE, type_name=".Feature",
        label=field.LABEL_OPTIONAL,
    )  # fmt: skip
    features.field.add(
        name="feature", number=1, type=field.TYPE_MESSAGE, type_name=".Features.FeatureEntry",
        label=field.LABEL_REPEATED,
    )  # fmt: skip
    message("Example", ("features", 1, "Features"))
    pool.Add(file)
    return factory.GetMessageClass(pool.FindMessageTypeByName("Example"))


def example_texts(content: bytes) -> dict[str, Any] | None:
    """Return the fields of a tf.train.Example: text, bytes that are none, or None for numbers.

    Args:
        content: a record.

    Returns:
        {field: value}, or None if the record is something else.
    """
    errors = needed("google.protobuf.message", "a tf.train.Example")
    example = _example_class()()
    try:
        example.ParseFromString(content)
    except errors.DecodeError:
        return None
    if not example.features.feature:
        return None
    fields: dict[str, Any] = {}
    for name, feature in example.features.feature.items():
        values = feature.bytes_list.value
        fields[name] = _decoded_value(values[0]) if len(values) == 1 else None
    return fields


def _decoded_value(value: bytes) -> Any:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value
