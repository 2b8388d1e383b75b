//! Generates clients and servers from the schemas.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    weft_proto::build::compile(&["echo.proto", "pipeline.proto"], &["schema"])
}
