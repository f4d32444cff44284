#pragma once

/// Marks what liblongspan exports; everything else is built hidden.
#define LONGSPAN_API __attribute__((visibility("default")))
