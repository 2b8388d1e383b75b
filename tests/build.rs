//! Generates the services that the tests call.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    weft_proto::build::compile(&["test.proto"], &["schema"])
}
